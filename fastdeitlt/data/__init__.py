"""The input pipeline: data sets (``sets``), image order (``sampler``), decoding (``pixels``), ``augment``, ``mixup``.

Each stage consumes the output of the one before it. Imports ``config``, ``store`` and ``errors``.
"""
