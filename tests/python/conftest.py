# SPDX-License-Identifier: Apache-2.0
"""Finds what the tests exercise: the library (GDN_LIBRARY, else build/libgdn.so) and the program beside it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path(os.environ.setdefault("GDN_LIBRARY", str(ROOT / "build" / "libgdn.so")))

if not LIBRARY.is_file():
    pytest.exit(f"{LIBRARY} is missing: run `make build` first", returncode=1)


@pytest.fixture(scope="session")
def program() -> Path:
    """The program gdn of the same build."""
    path = LIBRARY.parent / "bin" / "gdn"
    assert path.is_file(), f"{path} is missing: run `make build` first"
    return path
