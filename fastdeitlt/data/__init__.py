"""From a data set to batches: which images (sets), in which order (sampler), decoded (pixels), augmented and mixed.

Each stage receives what the one before it yields: sets, sampler, pixels, augment, mixup. Imports ``config``, ``store``
and ``errors``; everything above may import it.
"""
