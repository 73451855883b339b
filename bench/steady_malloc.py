# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark's process with a malloc that keeps its pages, which glibc only takes from the environment.

Page faults would otherwise dominate the time of plain PyTorch code, and they are not what is to be compared. Import
this before torch.
"""

import os
import sys

TUNABLES = (
    "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)


def restart():
    """Starts this program anew with those settings, unless it runs with them already."""
    if os.environ.get("GLIBC_TUNABLES") == TUNABLES:
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.argv])
