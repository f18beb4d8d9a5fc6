"""python -m tests.torture [--rounds N] [--seed N]: see README.md."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.torture.faults import FAULTS
from tests.torture.ground import Ground
from tests.torture.node_ground import NODE_FAULTS, NodeGround
from tests.torture.rounds import Session

NODE_EVERY = 8  # rounds: one of so many is done under a node service


def run(
    rounds: int, seed: int, directory: Path, say: Callable[[str], None], fault: str = ""
) -> None:
    """All rounds; the error says which round failed and how. Everything started is ended."""
    source = random.Random(seed)
    sessions: dict[bool, Session] = {}
    with_node = any(fault in other.name for other in NODE_FAULTS)
    by_hand = any(fault in other.name for other in FAULTS)
    try:
        for number in range(1, rounds + 1):
            is_node = with_node and (number % NODE_EVERY == 0 or not by_hand)
            if is_node not in sessions:
                seed_of_session = source.randrange(1 << 32)
                if is_node:
                    made = Session(NodeGround(directory / "node"), NODE_FAULTS, seed_of_session)
                else:
                    made = Session(Ground(directory / "hand"), FAULTS, seed_of_session)
                sessions[is_node] = made
                made.ground.start_everything()
            session = sessions[is_node]
            try:
                told = session.round(fault)
            except BaseException:
                say(f"round {number}/{rounds} FAILED, seed {seed}, fault: {session.fault}")
                raise
            say(f"round {number}/{rounds} {told}")
        for session in sessions.values():
            session.compare()
    finally:
        for session in sessions.values():
            session.ground.destroy()


def main() -> int:
    """The command line; 1: something was wrong, and its directory is kept."""
    parse = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    parse.add_argument("--rounds", type=int, default=200)
    parse.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parse.add_argument("--fault", default="", help="only faults whose name contains this")
    options = parse.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"seed {options.seed}, {options.rounds} rounds in {directory}", flush=True)
    began = time.monotonic()
    try:
        run(
            options.rounds,
            options.seed,
            directory,
            lambda line: print(line, flush=True),
            options.fault,
        )
    except Exception:
        traceback.print_exc()
        print(f"seed {options.seed}: everything is kept in {directory}", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    print(f"{options.rounds} rounds in {time.monotonic() - began:.0f} s, nothing lost", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
