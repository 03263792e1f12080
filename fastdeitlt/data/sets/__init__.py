"""Data sets: folders, lists, shards and archives to paths, labels and classes.

The entry point is ``opening``. Imports ``config``, ``store`` and ``errors`` only.
"""
