"""HTML reports of runs: tables, figures, and sections of analyses.

Reads the files of finished runs. Imports ``evaluation``, ``run`` and below.
"""
