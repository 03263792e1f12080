"""Benchmarks: one timer, one file per op, committed result rows."""
