# SPDX-License-Identifier: Apache-2.0
"""What machine a benchmark ran on."""

import pathlib


def cpu_name() -> str:
    """The CPU as the program names it."""
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"
