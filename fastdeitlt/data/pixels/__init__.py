"""Sources of pixels: streamed (reader), cached on disk (cache), in memory (resident).

``source.open_source`` selects and connects them. A source yields each request with its pixels. Imports ``data.sets``.
"""
