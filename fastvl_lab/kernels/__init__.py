"""Kernels: `plain` has what every recipe uses, in plain PyTorch; each other file one Triton kernel beside its plain reference.

They know tensors, never models. Triton is imported with the files that need it, and these by the options that run them.
"""
