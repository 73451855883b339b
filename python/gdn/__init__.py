# SPDX-License-Identifier: Apache-2.0
"""Gated DeltaNet and the sequence mixers around it.

Importing the package loads libgdn into the running PyTorch: its operators are then ``torch.ops.gdn.*`` (also as
``gdn.ops``), and ``python -m gdn`` is the program ``gdn`` in this process.
"""

import ctypes
import os
from pathlib import Path

import torch

__all__ = ["__version__", "library_path", "main", "ops"]

_NAME = "libgdn.so"


def _find_library() -> Path:
    """The library to load: $GDN_LIBRARY, else the one beside this package, else the one of the clone's build folder."""
    given = os.environ.get("GDN_LIBRARY")
    if given:
        if not Path(given).is_file():
            raise ImportError(f"GDN_LIBRARY={given} is not a file")
        return Path(given)
    package = Path(__file__).resolve().parent
    candidates = [package / _NAME, package.parents[1] / "build" / _NAME]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    places = " or ".join(str(candidate) for candidate in candidates)
    raise ImportError(f"{_NAME} was found neither at {places}: run `make build` in the clone, or set GDN_LIBRARY")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load(path: Path) -> ctypes.CDLL:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # A symbol that torch lacks or a library of another torch: what the loader says names neither cause nor remedy.
        raise ImportError(
            f"{path} does not load into torch {torch.__version__}: {error}; "
            "build it with this torch (`make build` in the clone uses the one in .venv)"
        ) from error
    library = ctypes.CDLL(str(path))
    library.gdn_version.restype = ctypes.c_char_p
    library.gdn_torch_version.restype = ctypes.c_char_p
    library.gdn_main.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    built_with = library.gdn_torch_version().decode()
    if _minor(built_with) != _minor(torch.__version__):
        raise ImportError(
            f"{path} was built with torch {built_with}, but this is torch {torch.__version__}: "
            "install that minor version, or build again"
        )
    return library


library_path = _find_library()
_library = _load(library_path)

__version__: str = _library.gdn_version().decode()

ops = torch.ops.gdn


def main(arguments: list[str]) -> int:
    """Runs the program ``gdn`` with these arguments in this process; returns its exit status (0, 1, 2 or 130)."""
    words = [os.fsencode(word) for word in ["gdn", *arguments]]
    argv = (ctypes.c_char_p * (len(words) + 1))(*words, None)
    return int(_library.gdn_main(len(words), argv))
