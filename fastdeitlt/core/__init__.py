"""The training step and its assembly: batches, joint loss, optimizer, engine, and the timing of its parts.

Imports ``data``, ``models`` and ``kernels``. ``teachers``, ``run``, ``tools`` and the spine ``train.py`` may import it.
"""
