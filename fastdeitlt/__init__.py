"""fastdeitlt: train Vision Transformers from scratch on long-tailed images (DeiT-LT, arXiv 2404.02900)."""

__version__ = "0.1.0"
