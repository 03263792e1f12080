"""The verbs beside training: bench, profile, tune, dry run, demo, ablate, predict, export, doctor.

May import everything; only the command line and the benchmarks import it.
"""
