"""Scores from logits and labels: accuracy of both heads by group, calibration, post-hoc corrections, signs of failure.

``evaluate`` also collects the logits. Imports ``data`` and ``models``; imported by ``run``, ``reporting``, ``tools``.
"""
