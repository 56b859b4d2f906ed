"""Kernels: who computes an operation, one folder for each backend."""
