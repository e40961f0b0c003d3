"""The native library of CPU kernels: its sources, loaded with ctypes, under the names of what calls them."""
