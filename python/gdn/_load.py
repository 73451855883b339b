# SPDX-License-Identifier: Apache-2.0
"""Finds libgdn, loads it into the running PyTorch, and says in one sentence what is wrong where it cannot."""

import ctypes
import mmap
import os
import platform
import warnings
from pathlib import Path

import torch

_NAME = "libgdn.so"
# What the fast forms of the kernels need on x86; without them the portable forms run.
_WANTED = ("avx2", "fma")


def find_library() -> Path:
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
    places = " nor at ".join(str(candidate) for candidate in candidates)
    raise ImportError(f"{_NAME} was found neither at {places}: run `make build` in the clone, or set GDN_LIBRARY")


def minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _torch_version_of(path: Path) -> str | None:
    """The torch the library was built with, read from the file: it must be known even where loading fails."""
    marker = b"gdn-built-with-torch:"
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            begin = data.find(marker)
            if begin < 0:
                return None
            begin += len(marker)
            return data[begin : data.find(b"\0", begin)].decode(errors="replace")


def lacking_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """CPU features that the fast kernels want and this machine lacks; empty where the system does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), None)
    return [] if flags is None else [name for name in _WANTED if name not in flags]


def load(path: Path) -> ctypes.CDLL:
    """Loads the library; an ImportError where torch does not fit it, a warning where the processor does not."""
    built_with = _torch_version_of(path)
    if built_with is not None and minor(built_with) != minor(torch.__version__):
        raise ImportError(
            f"{path} was built with torch {built_with}, but this is torch {torch.__version__}: "
            "install that minor version, or build again"
        )
    lacking = lacking_features()
    if lacking:
        warnings.warn(
            f"this processor lacks {' and '.join(lacking)}: gdn runs its kernels in their portable form, which is slow",
            RuntimeWarning,
            stacklevel=3,
        )
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
    library.gdn_main.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library
