"""Timing: the timer, the operations of a step at its shapes, and what the first start on a GPU measures.

Imports the step's own modules, never the reverse. ``run``, ``tools`` and the benchmarks may import it.
"""
