"""Augmentation: parameters drawn on the host, applied to batches with torch.

The Triton kernels apply the same draws. Reads no files.
"""
