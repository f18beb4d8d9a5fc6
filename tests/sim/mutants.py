"""`python -m tests.sim.mutants`: can the simulator fail? Each mutation must be found.

For each mutation, seeds are run in a process of its own until one shows a violation, at most
SEEDS_MAX. Prints a table; the exit code is 1 if one was not found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.sim.mutations import MUTATIONS, Mutation, install

SEEDS_MAX = 2000


def hunt(mutation: Mutation, first: int, seeds: int) -> int:
    """In a process of its own: seeds until the first violation; prints one line."""
    install(mutation)
    from tests.sim.run import run_seed

    for number in range(seeds):
        result = run_seed(first + number)
        if result.error:
            lines = [line for line in result.error.splitlines() if line.strip()]
            print(f"{number + 1}\t{first + number}\t{lines[0]}")
            return 0
    print(f"0\t\tnot found in {seeds} seeds")
    return 1


def _start(mutation: Mutation, first: int, seeds: int) -> tuple[Mutation, list[str]]:
    command = [sys.executable, "-m", "tests.sim.mutants", "--hunt", mutation.name]
    command += ["--first", str(first), "--seeds", str(seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return mutation, lines[-1].split("\t") if lines else ["0", "", done.stderr.strip()[-300:]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutations whose name contains one of these")
    parser.add_argument("--hunt", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=1, help="the first seed (1)")
    parser.add_argument("--seeds", type=int, default=SEEDS_MAX, help=f"at most ({SEEDS_MAX})")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    options = parser.parse_args()
    if options.hunt:
        wanted = next(m for m in MUTATIONS if m.name == options.hunt)
        return hunt(wanted, options.first, options.seeds)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.names or any(name in mutation.name for name in options.names)
    ]
    missed = 0
    print(f"{'rule':>4}  {'seeds':>5}  mutation: what the simulator says", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, (count, _, what) in pool.map(
            lambda m: _start(m, options.first, options.seeds), chosen
        ):
            missed += count == "0"
            shown = count if count != "0" else "-"
            print(f"{mutation.rule:>4}  {shown:>5}  {mutation.name}: {what[:110]}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
