"""python -m tests.powercut [--seed N]: see README.md."""

from __future__ import annotations

import argparse
import os
import sys

from tests.powercut.replay import Replay

HISTORIES = 3  # of each kind
STATES = 8  # random ones per boundary


def main() -> int:
    """The command line; 1: something was wrong."""
    parse = argparse.ArgumentParser(prog="python -m tests.powercut", description=__doc__)
    parse.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parse.add_argument("--histories", type=int, default=HISTORIES, help="of each kind")
    parse.add_argument("--states", type=int, default=STATES, help="random ones per boundary")
    parse.add_argument("--kind", choices=("life", "rebuild"), help="only these")
    options = parse.parse_args()
    violations = 0
    for seed in range(options.seed, options.seed + options.histories):
        for kind in ("life", "rebuild"):
            if options.kind in (None, kind):
                replay = Replay(kind, seed, options.states, prefixes=True)
                replay.run()
                print(replay.line(), flush=True)
                for text in replay.violations:
                    print(f"  {text}", flush=True)
                violations += len(replay.violations)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
