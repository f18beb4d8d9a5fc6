"""Proves the ublk front end with a real kernel: tests/blockd/test_*ublk*.py, run in a guest.

The machine is emulated, so everything may take several times as long as elsewhere, stalls included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.guest.conftest import EVERYTHING
from tests.guest.machine import Guest

PATIENCE = 4
MEMORY_MIB = 2048
RUN_SECONDS = 1500.0
DISK_BYTES = 8 << 30
SHORT = "engine or (remount and ext4) or killing_the_volume_daemon or successor or in_use"


def test_the_ublk_front_end_with_its_driver(own_guest: Callable[..., Guest]) -> None:
    own = own_guest(memory_mib=MEMORY_MIB, disks={"data": DISK_BYTES})
    own.shell("modprobe ublk_drv; mkfs.ext4 -q /dev/vdb; mount /dev/vdb /var/tmp")
    result = own.run(
        *("env", f"BLOCKD_TEST_PATIENCE={PATIENCE}", "python3", "-m", "pytest", "-ra"),
        *("-p", "no:cacheprovider", "--durations=0", "-s"),
        *("tests/blockd/test_ublk_engine.py", "tests/blockd/test_node_ublk.py"),
        *("tests/blockd/test_io_uring.py", "-k"),
        "not speed" if EVERYTHING else f"not speed and ({SHORT})",
        timeout_seconds=RUN_SECONDS,
        check=False,
    )
    print(result.out, result.err, file=sys.stderr)
    assert result.code == 0
    assert "SKIPPED" not in result.out
