"""What the kernels of `torch_ops` are made of: PyTorch's own kernels, and what they need."""
