"""Files that are whole or absent: atomic writes, model folders with manifest and checksums, the user cache.

Imports ``config`` and ``errors`` only; everything that reads or writes files may import it.
"""
