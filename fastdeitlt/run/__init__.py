"""Run management: folder, checkpoints, meter, weight selection, launch, signals.

Imports ``core``, ``evaluation`` and below.
"""
