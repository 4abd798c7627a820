"""The CUDA kernels of this package, and the code that compiles and launches them."""
