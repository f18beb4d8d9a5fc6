"""Proves with real kernel devices that upgrades are pauses: tests/blockd/test_device_upgrades.py in
a guest. BLOCKD_GUEST_UPGRADES tells how many in a row (3; 20 is what volumes should bear)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from tests.guest.machine import Guest

PATIENCE = 4
MEMORY_MIB = 2048
RUN_SECONDS = 3000.0


@pytest.mark.long
@pytest.mark.parametrize("front_end", ["nbd", "ublk"])
def test_upgrades_of_volumes_on_kernel_devices(
    own_guest: Callable[..., Guest], front_end: str
) -> None:
    own = own_guest(memory_mib=MEMORY_MIB)
    own.shell("modprobe nbd; modprobe ublk_drv; mount -t tmpfs -o size=75% tmpfs /tmp")
    count = os.environ.get("BLOCKD_GUEST_UPGRADES", "3")
    result = own.run(
        *("env", f"BLOCKD_TEST_PATIENCE={PATIENCE}", f"BLOCKD_TEST_UPGRADES={count}"),
        *("python3", "-m", "pytest", "-ra", "-s", "-p", "no:cacheprovider"),
        *("tests/blockd/test_device_upgrades.py", "-k", front_end),
        timeout_seconds=RUN_SECONDS,
        check=False,
    )
    print(result.out, result.err, file=sys.stderr)
    assert result.code == 0
    assert "skipped" not in result.out
