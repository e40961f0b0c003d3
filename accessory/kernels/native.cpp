extern "C" int accessory_kernels_abi() { return 1; }
