"""Atomic writes, model folders with manifest and checksums, and the user cache.

Imports ``config`` and ``errors`` only.
"""
