"""A run while it lasts: folder, checkpoints, meter, selection of weights, launch of ranks, signals and exit codes.

Imports ``core``, ``evaluation`` and below; the spine, ``reporting``, ``tools`` and the command line import it.
"""
