# SPDX-License-Identifier: Apache-2.0
"""``python -m gdn COMMAND ...``: the program gdn in a Python process."""

import signal
import sys

import gdn


def main() -> None:
    # Python's own handler would only note Ctrl-C until the program returns.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(gdn.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
