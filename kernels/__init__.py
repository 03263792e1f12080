"""Triton kernels, imported as ``fastdeitlt.kernels``: one op, one file, one test, one benchmark.

Each op has its float32 ``reference`` beside it. Imports ``data`` (laws of augmentation), ``store`` and ``errors``;
``models``, ``core`` and the benchmarks import it.
"""

if __name__ != "fastdeitlt.kernels":
    raise ImportError(
        "this folder is the package fastdeitlt.kernels, not a top-level 'kernels': "
        "run 'pip install -e .' and import fastdeitlt.kernels"
    )
