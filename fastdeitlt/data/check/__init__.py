"""`data check` and `data stats`: findings about a data set, its splits and its files.

Imports ``data.sets`` and ``data.pixels``; the command line and ``core.assemble`` import it.
"""
