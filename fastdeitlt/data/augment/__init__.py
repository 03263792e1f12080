"""Augmentation of one image: drawn ahead on the host, applied to a batch of crops in torch operations.

The Triton kernels apply the same draws. Batches, kernels and evaluation import it; it reads no files.
"""
