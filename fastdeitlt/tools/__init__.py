"""Commands other than training, such as bench, tune, plan, predict and export.

May import everything; imported only by the command line, the API and the benchmarks.
"""
