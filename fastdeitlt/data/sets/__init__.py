"""Which images: folders, lists, shards and archives become paths, labels, class counts and class names.

``opening`` is the entry. Imports ``config``, ``store`` and ``errors`` only; everything that needs images imports it.
"""
