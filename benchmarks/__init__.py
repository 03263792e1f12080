"""Benchmarks: a file for each op, one timer, committed result rows.

May import the whole package; the package never imports them.
"""
