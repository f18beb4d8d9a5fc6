"""The daemons of the data path: one per replica, one per attached volume."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """`blockd daemon replica|volume ...`; returns the exit code."""
    kind = arguments[0] if arguments else ""
    if kind == "replica":
        from blockd.daemons.replica import main as replica_main

        return replica_main(arguments[1:])
    if kind == "volume":
        from blockd.daemons.volume_main import main as volume_main

        return volume_main(arguments[1:])
    if kind == "spare":
        from blockd.daemons.spare import main as spare_main

        return spare_main(main)
    usage = "usage: blockd daemon replica DIR --listen ADDRESS | volume NAME --replica ADDRESS ..."
    if kind in ("-h", "--help"):
        print(usage + "\n`blockd daemon replica --help` and `blockd daemon volume --help` say more")
        return 0
    print(f"blockd: {usage}", file=sys.stderr)
    return 2
