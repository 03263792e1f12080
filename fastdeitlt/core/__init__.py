"""The training step: batches, joint loss, precision, optimizer and engine, and the timing of its parts.

Imports ``data``, ``models`` and ``kernels``. ``teachers``, ``run``, ``tools`` and the spine ``train.py`` may import it.
"""
