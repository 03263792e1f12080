"""`data check` and `data stats`: findings about splits and image files.

Imports ``data.sets`` and ``data.pixels``.
"""
