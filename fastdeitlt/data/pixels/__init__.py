"""From a request to pixels: read and decode (reader), keep decoded on disk (cache) and in memory (resident).

``source.open_source`` connects the three; none of them calls another one that reads. A source yields each request with
its pixels. Imports ``data.sets``; batches, evaluation, teachers and tools import it.
"""
