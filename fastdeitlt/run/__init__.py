"""Run management: folder, checkpoints, meter, weight selection, rank launch, signals.

Imports ``core``, ``evaluation`` and below.
"""
