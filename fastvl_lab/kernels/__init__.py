"""Kernels: `plain` has what recipes use in plain PyTorch; each other file a Triton kernel, and its reference if `plain` has none.

They know tensors, never models. Triton is imported with the files that need it, and these by the options that run them.
"""
