"""Triton kernels, imported as ``fastdeitlt.kernels``: one op, one file, one test, one benchmark."""

if __name__ != "fastdeitlt.kernels":
    raise ImportError(
        "this folder is the package fastdeitlt.kernels, not a top-level 'kernels': "
        "run 'pip install -e .' and import fastdeitlt.kernels"
    )
