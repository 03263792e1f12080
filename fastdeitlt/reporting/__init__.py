"""The HTML report of a run or of several, its tables and figures, and the analyses that add sections to it.

Reads a finished run's files. Imports ``evaluation``, ``run`` and below; the spine, ``tools`` and the command line
import it.
"""
