"""Build of the optional native kernels; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

SOURCES = ("attention", "products", "quantized", "steps", "tiles", "tiles_attention")
SOURCES += ("tiles_int8",)
HEADERS = ("amx", "attention_row", "elements", "quantized_row", "quantized_stage", "quantized_vectors")
HEADERS += ("quantized_weight", "row_dot", "schedule", "steps_row", "target", "tiles", "variants", "vectors")

# No torch or Python headers are used (a plain C interface, loaded with ctypes), so the build needs a C++
# compiler and nothing else. optional=True: without a compiler the PyTorch references of the kernels serve.
kernels = Extension(
    "accessory.kernels.cpu._native",
    sources=[f"accessory/kernels/cpu/{name}.cpp" for name in SOURCES],
    depends=[f"accessory/kernels/cpu/{name}.h" for name in HEADERS],
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno"],
    extra_link_args=["-fopenmp"],
    language="c++",
    optional=True,
)

setup(ext_modules=[kernels])
