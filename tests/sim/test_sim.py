"""The simulator runs, repeats itself, and can fail. Many seeds: `make sim`, `make sim-mutants`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.sim.faults import ALL_KINDS
from tests.sim.run import run_seed

SEEDS = range(1, 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_shows_no_violation(seed: int) -> None:
    result = run_seed(seed)
    assert not result.error, "\n".join([*result.trace[-60:], result.error])
    assert result.operations >= 500
    assert result.faults >= 5


def test_one_seed_is_one_run() -> None:
    first, second = run_seed(7), run_seed(7)
    assert first.trace == second.trace
    assert first.digest == second.digest
    assert run_seed(8).digest != first.digest


def test_there_are_enough_kinds_of_fault() -> None:
    assert len(set(ALL_KINDS)) >= 20


def test_a_mutant_is_found() -> None:
    command = [sys.executable, "-m", "tests.sim.mutants", "promote before", "--seeds", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 found" in done.stdout
