"""Environment to run the checkout without installation: unpacked wheels and a linked package for worker processes.

Only the standard library is required. ``pip`` is not used, because an image without network may not have it.
"""

import importlib.metadata
import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("kernels", "configs")
"""Folders of the checkout that are packages inside ``fastdeitlt`` when installed."""


def environment(scratch: Path, wheels: Path | None = None) -> dict[str, str]:
    """Return an environment in which Python imports this checkout and the wheels.

    Args:
        scratch: empty folder for links and unpacked wheels; it must outlive the workers.
        wheels: folder of wheels, which override installed packages of the same name. None = installed packages only.

    Raises:
        ValueError: no wheel in the folder, or one that is not for this Python.
    """
    paths = [_linked(scratch / "checkout"), *([_unpacked(wheels, scratch / "wheels")] if wheels else []), ROOT]
    entries = [str(path) for path in paths] + [p for p in [os.environ.get("PYTHONPATH", "")] if p]
    # without PYTHONSAFEPATH the working directory would come first, whose fastdeitlt has no kernels
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # its bfloat16 is wrong
    return kept | {"PYTHONPATH": os.pathsep.join(entries), "PYTHONSAFEPATH": "1"}


def _linked(folder: Path) -> Path:
    """Link the package's files and the folders ``BESIDE`` into one package."""
    package = folder / "fastdeitlt"
    package.mkdir(parents=True)
    for path in [*(ROOT / "fastdeitlt").iterdir(), *(ROOT / name for name in BESIDE)]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return folder


def _unpacked(wheels: Path, folder: Path) -> Path:
    """Unpack the wheels, since a compiled module cannot be imported from a zip file."""
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise ValueError(f"--wheels {wheels}: no *.whl file; see docs/gpu_first_run.md for the download")
    for file in files:
        if not fits(file.name):
            raise ValueError(
                f"--wheels {file}: not for Python {sys.version_info.major}.{sys.version_info.minor}; download it "
                f"with pip download --python-version {sys.version_info.major}.{sys.version_info.minor}"
            )
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    return folder


def fits(wheel: str) -> bool:
    """Return whether a wheel is for this Python by its name (PEP 427), any platform."""
    python, abi = wheel.removesuffix(".whl").split("-")[-3:-1]
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return own in python.split(".") or "py3" in python.split(".") or "abi3" in abi.split(".")


def missing(packages: tuple[str, ...], wheels: Path | None = None) -> list[str]:
    """Return the distributions neither installed nor among the wheels."""
    carried = {file.name.split("-")[0].replace("_", "-").lower() for file in wheels.glob("*.whl")} if wheels else set()
    return [name for name in packages if name not in carried and version_of(name) is None]


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
