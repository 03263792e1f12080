"""Triton kernels, imported as ``fastdeitlt.kernels``: a file, a test and a benchmark for each op.

Each op has a float32 ``reference`` in the same file. Imports ``data`` (augmentation parameters), ``store`` and
``errors``; imported by ``models``, ``core`` and the benchmarks.
"""

if __name__ != "fastdeitlt.kernels":
    raise ImportError(
        "kernels: got a top-level import, expected fastdeitlt.kernels. "
        "Run 'pip install -e .' and import fastdeitlt.kernels."
    )
