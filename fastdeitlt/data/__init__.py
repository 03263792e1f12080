"""The input pipeline: sets, sampler, pixels, augment, mixup.

Each stage consumes the output of the one before it. Imports ``config``, ``store``, ``distributed`` and ``errors``.
"""
