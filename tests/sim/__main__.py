"""`python -m tests.sim SEED [--count N] [--jobs J] [--trace]`: run seeds, stop at a violation."""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests.sim.run import TRACE_SHOWN, Result, run_seed


def commit() -> str:
    """The commit of the working directory."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def prepare() -> None:
    """What a worker does once: what is there by now is never garbage."""
    gc.collect()
    gc.freeze()


def show(result: Result, lines: int) -> None:
    """A violation, or a whole trace."""
    for line in result.trace[-lines:]:
        print(line)
    if result.error:
        print(f"seed {result.seed} at commit {commit()}: {result.error}")
        print(f"again: python -m tests.sim {result.seed} --trace", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="the first seed; none: a random one")
    parser.add_argument("--count", type=int, default=1, help="so many seeds from there on (1)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    parser.add_argument("--trace", action="store_true", help="show the whole trace")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a violation")
    options = parser.parse_args()
    first = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 40)
    seeds = range(first, first + options.count)
    print(f"seeds {first} to {seeds[-1]}, commit {commit()}", flush=True)
    began = time.monotonic()
    done = operations = faults = failures = 0
    kinds: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        results: Iterable[Result]
        if options.jobs > 1:
            fork = multiprocessing.get_context("fork")
            pool = stack.enter_context(fork.Pool(options.jobs, prepare))
            results = pool.imap_unordered(run_seed, seeds)
        else:
            prepare()
            results = map(run_seed, seeds)
        for result in results:
            done += 1
            operations += result.operations
            faults += result.faults
            kinds.update(result.kinds)
            if options.trace or result.error:
                show(result, 1 << 30 if options.trace else TRACE_SHOWN)
            if result.error:
                failures += 1
                if not options.keep_going:
                    break
    minutes = (time.monotonic() - began) / 60
    print(
        f"{done} seeds, {done / minutes:.0f} a minute, {operations} operations, {faults} faults of "
        f"{len(kinds)} kinds, {failures} violations"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
