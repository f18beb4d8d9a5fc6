"""Proves that a volume on a kernel device can be written with more than the machine's memory.

When the kernel is short of memory it writes dirty pages to the volume, whose daemons then need
some themselves: that neither stands still nor ends with a killed process. BLOCKD_GUEST_DIRTY_MIB
says how much is written; 4096 is the full form.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

import pytest

from tests.guest.conftest import temporary_directory
from tests.guest.image import Image
from tests.guest.machine import Guest
from tests.guest.service import Service

MEMORY_MIB = 512
DIRTY_MIB = int(os.environ.get("BLOCKD_GUEST_DIRTY_MIB", "768"))
DISK_BYTES = 32 << 30  # sparse
# A hang, not a slow machine: about 20 MiB/s on an idle one.
HANG_SECONDS = 120.0 + DIRTY_MIB


@pytest.fixture(scope="module")
def service(guest_image: Image) -> Iterator[Service]:
    """A node service in a machine with little memory."""
    with (
        temporary_directory() as directory,
        Guest(directory, guest_image, memory_mib=MEMORY_MIB, disks={"data": DISK_BYTES}) as machine,
    ):
        machine.shell("mkfs.ext4 -q /dev/vdb; mkdir /data; mount /dev/vdb /data")
        yield Service(machine, "/data/memory")


@pytest.mark.long
@pytest.mark.parametrize("replicas", [1])
@pytest.mark.parametrize("frontend", ["nbd", "ublk"])
def test_more_is_written_than_there_is_memory(
    service: Service, frontend: str, replicas: int
) -> None:
    name, guest = f"{frontend}{replicas}", service.guest
    size = f"{DIRTY_MIB + 512}M"
    service.blockd("volume", "create", name, "--size", size, "--replicas", str(replicas))
    service.blockd("volume", "attach", name, "--frontend", frontend)
    before = service.blockd("volume", "mount", name)
    where = before["mount"]["path"]
    result = guest.run(
        *("python3", "-m", "tests.guest.writer", "fill", f"{where}/file", str(DIRTY_MIB)),
        timeout_seconds=HANG_SECONDS,
    )
    print(f"MEMORY {name}, {DIRTY_MIB} MiB: {result.out}", end="", file=sys.__stderr__)
    assert json.loads(result.out)["bad_mib"] == []
    after = service.until(name, health="healthy")
    assert _processes(after) == _processes(before)
    kernel = guest.run("dmesg").out
    for trouble in ("Out of memory", "oom-kill", "I/O error", "EXT4-fs error"):
        assert trouble not in kernel
    service.blockd("volume", "umount", name)
    service.blockd("volume", "detach", name)
    service.blockd("volume", "rm", name)


def _processes(view: dict[str, object]) -> list[object]:
    """The daemons of a volume."""
    replicas = view["replicas"]
    assert isinstance(replicas, list)
    return [view["pid"], *(replica["pid"] for replica in replicas)]
