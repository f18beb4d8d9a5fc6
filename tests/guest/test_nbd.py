"""Proves the front ends nbd and nbd-client with a real kernel: tests of tests/blockd, in a guest.

The machine is emulated, so everything may take four times as long as elsewhere, stalls included:
Python alone needs longer to begin there than a whole takeover does on real hardware.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.guest.conftest import EVERYTHING
from tests.guest.machine import Guest

PATIENCE = 4
MEMORY_MIB = 2048  # replicas are kept in memory: the emulated disk is not what is tested
RUN_SECONDS = 1500.0
SHORT = "(lives_on_it and ext4) or death_of_the_volume_daemon or not_taken_away"
TOOL_SHORT = "nbd-client and (trim or helper)"


def test_the_nbd_front_end_with_its_driver(own_guest: Callable[..., Guest]) -> None:
    _run(own_guest, "tests/blockd/test_node_nbd.py", *(() if EVERYTHING else ("-k", SHORT)))


def test_the_nbd_client_front_end_with_its_driver(own_guest: Callable[..., Guest]) -> None:
    chosen = "nbd-client" if EVERYTHING else TOOL_SHORT
    _run(own_guest, "tests/blockd/test_node_fuse.py", "-k", chosen)


def _run(own_guest: Callable[..., Guest], *arguments: str) -> None:
    """pytest in a guest; nothing may be skipped."""
    own = own_guest(memory_mib=MEMORY_MIB)
    own.shell("modprobe nbd; mount -t tmpfs -o size=75% tmpfs /tmp")
    result = own.run(
        *("env", f"BLOCKD_TEST_PATIENCE={PATIENCE}", "python3", "-m", "pytest", "-ra"),
        *("-p", "no:cacheprovider", "--durations=0", *arguments),
        timeout_seconds=RUN_SECONDS,
        check=False,
    )
    print(result.out, result.err, file=sys.stderr)
    assert result.code == 0
    assert "skipped" not in result.out
