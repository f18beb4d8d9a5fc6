"""The `blockd` program: the command line, and the daemons it starts.

`blockd daemon ...` goes straight to the daemons, so that a daemon process never loads the terminal
and HTTP libraries of the command line: they would cost each daemon more memory than its own code.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the program with this process's arguments; return its exit code."""
    if sys.argv[1:2] == ["daemon"]:
        from blockd.daemons import main as daemons_main

        return daemons_main(sys.argv[2:])
    from blockd.cli import main as cli_main

    return cli_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
