"""Benchmarks: one timer, one file per op, committed result rows.

May import everything of the package; nothing of it imports them.
"""
