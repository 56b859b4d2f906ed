"""Kernels for GPUs, written in Python for numba.cuda: one file for each operation."""
