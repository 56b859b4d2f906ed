"""CPU kernels in numba. A GPU twin of a file here has the same name in `kernels/cuda`."""
