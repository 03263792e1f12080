"""Training step and its assembly: batches, joint loss, optimizer, engine, and the timing of its parts.

Imports ``data``, ``models`` and ``kernels``; may be imported by ``teachers``, ``run``, ``tools`` and ``train.py``.
"""
