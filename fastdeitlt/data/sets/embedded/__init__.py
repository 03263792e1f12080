"""Fashion-MNIST-LT, a long-tailed set shipped with the package.

10 classes, 1000 to 10 training images (2,478, exponential decay), 500 balanced validation and 1,000 balanced test
images, 28 x 28 gray, as PNG files with list files for the same reader as ImageNet-LT. A subset of Fashion-MNIST (Xiao,
Rasul, Vollgraf 2017; copyright 2017 Zalando SE, MIT licence, see LICENSE.fashion-mnist next to this file), built by
``python -m fastdeitlt.data.sets.embedded.build``.
"""

import hashlib
import os
import zipfile
from pathlib import Path

from filelock import FileLock

from fastdeitlt.errors import UserError
from fastdeitlt.store.files import draft_folder, user_cache

ARCHIVE = Path(__file__).with_name("fashion_mnist_lt.zip")
SHA256 = "a21017d47ca7399a1351967bfc8aa39e47b448ed8611becf03bc21199b9125d3"
"""Digest of the archive; its start is the name of the unpacked folder."""


def cache_folder() -> Path:
    """Return the folder of the unpacked archive."""
    return user_cache(SHA256[:16])


def unpack() -> Path:
    """Return the folder of images and lists, unpacked at the first call.

    Safe for concurrent processes: one unpacks into a temporary folder and renames it. A folder with a missing file or a
    wrong file size is replaced.

    Raises:
        UserError: the archive is damaged, or the cache cannot be written.
    """
    folder = cache_folder()
    try:
        with zipfile.ZipFile(ARCHIVE) as archive:
            if _complete(folder, archive):
                return folder
            digest = hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()
            if digest != SHA256:
                raise UserError(f"{ARCHIVE}: got sha256 {digest}, expected {SHA256}. Reinstall fastdeitlt.")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not _complete(folder, archive):
                    with draft_folder(folder) as draft:
                        archive.extractall(draft)
    except zipfile.BadZipFile as error:
        raise UserError(f"{ARCHIVE}: damaged ({error}). Reinstall fastdeitlt.") from None
    except OSError as error:
        raise UserError(f"cache {folder}: {error}. Set XDG_CACHE_HOME to a writable folder.") from None
    return folder


def _complete(folder: Path, archive: zipfile.ZipFile) -> bool:
    try:
        return all(os.stat(folder / f.filename).st_size == f.file_size for f in archive.infolist())
    except (FileNotFoundError, NotADirectoryError):
        return False
