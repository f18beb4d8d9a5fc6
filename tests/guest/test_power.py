"""Proves that volumes survive a power cut of their machine, on both kernel front ends.

All replicas are on that machine. What a program has fsynced is there afterwards, the file system's
journal is replayed, and volumes are attached and mounted where they were by nothing but the start
of the node service.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from tests.guest.machine import Guest
from tests.guest.service import Service

HOME = "/data/power"
# The second is not below HOME: after the cut its directory is not there, the root being fresh.
VOLUMES = {"nbd": f"{HOME}/mnt/nbd", "ublk": "/srv/ublk"}
DISK_BYTES = 8 << 30  # sparse
LOG = "/run/kept"  # in memory
FILES = 25  # fsynced in each volume before the power goes
WRITE_SECONDS = 120.0


@pytest.mark.long
def test_what_was_fsynced_survives_a_power_cut(own_guest: Callable[..., Guest]) -> None:
    own = own_guest(memory_mib=1024, disks={"data": DISK_BYTES})
    own.shell("mkfs.ext4 -q /dev/vdb; mkdir /data; mount /dev/vdb /data")
    service = Service(own, HOME)
    for name, where in VOLUMES.items():
        service.blockd("volume", "create", name, "--size", "512M", "--replicas", "3")
        service.blockd("volume", "attach", name, "--frontend", name)
        view = service.blockd("volume", "mount", name, where)
        assert (view["mount"]["path"], view["health"]) == (where, "healthy")

    directories = " ".join(VOLUMES.values())
    own.shell(
        f"""python3 -m tests.guest.writer keep {LOG} {directories} >/run/writer.log 2>&1 &
        echo $! >/run/writer.pid"""
    )
    kept = _kept(own)
    own.shell("kill -0 $(cat /run/writer.pid)")  # the cut comes in the midst of writing
    own.power_cut()

    own.boot()
    own.shell("mkdir /data; mount /dev/vdb /data")
    began = time.monotonic()
    service.start()
    for name, where in VOLUMES.items():
        view = service.until(name, state="attached", frontend=name)
        own.shell(f"grep ' {where} ext4 rw,' /proc/mounts")
        assert view["mount"]["path"] == where
    mounted = time.monotonic() - began
    kernel = own.run("dmesg").out
    for name in VOLUMES:
        device = service.blockd("volume", "show", name)["device"].removeprefix("/dev/")
        assert f"EXT4-fs ({device}): recovery complete" in kernel
    own.put("/run/kept", "".join(f"{line}\n" for line in kept).encode())
    own.shell("sha256sum --check --quiet /run/kept")
    for name, where in VOLUMES.items():
        service.until(name, health="healthy")
        own.shell(f"echo new >{where}/new; sync {where}/new")
    assert "EXT4-fs error" not in own.run("dmesg").out
    healthy = time.monotonic() - began
    print(
        f"POWER CUT: {len(kept)} files intact; mounted after {mounted:.0f} s, "
        f"healthy after {healthy:.0f} s",
        file=sys.__stderr__,
    )


def _kept(own: Guest) -> list[str]:
    """The lines of LOG, once there are enough for each volume."""
    deadline = time.monotonic() + WRITE_SECONDS
    while True:
        lines = own.shell(f"cat {LOG} 2>/dev/null || :").splitlines()
        counts = [sum(f" {where}/" in line for line in lines) for where in VOLUMES.values()]
        if min(counts) >= FILES:
            return lines
        assert time.monotonic() < deadline, f"{counts} files after {WRITE_SECONDS:g} s"
        time.sleep(0.2)
