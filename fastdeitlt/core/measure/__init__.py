"""Timing: the timer, the ops of a step at its shapes, and the measurements of the first start on a GPU.

Imports the step's modules, never the reverse; may be imported by ``run``, ``tools`` and the benchmarks.
"""
