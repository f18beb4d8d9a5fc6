"""Proves that the guest is what tests of real devices need, and that blockd works in it.

That is: both drivers, Python with all packages, a disk whose caches a power cut loses, systemd, and
an error with the console when the guest dies, hangs or does not boot.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.guest import machine
from tests.guest.conftest import DATA, temporary_directory
from tests.guest.image import Image
from tests.guest.machine import Guest, GuestError
from tests.guest.service import Service

MIB = 1 << 20


def test_the_kernel_has_nbd_and_ublk(guest: Guest) -> None:
    guest.shell("modprobe nbd; modprobe ublk_drv; test -b /dev/nbd0; test -c /dev/ublk-control")


def test_the_source_tree_and_its_packages_are_imported(guest: Guest) -> None:
    script = "import blockd.cli, blockd.node.service, pyroute2, pytest; print(blockd.__file__)"
    assert guest.run("python3", "-c", script).out == "/src/blockd/__init__.py\n"


def test_commands_have_output_an_exit_code_and_a_limit(guest: Guest) -> None:
    result = guest.run("sh", "-c", "cat; echo bad >&2; exit 3", stdin=b"good", check=False)
    assert (result.code, result.out, result.err) == (3, "good", "bad\n")
    with pytest.raises(GuestError, match="ended with 3"):
        guest.shell("exit 3")
    with pytest.raises(GuestError, match="took over 1 s"):
        guest.run("sleep", "1000", timeout_seconds=1)
    guest.shell("sleep 1000 & echo $! >/tmp/background")  # returns all the same
    guest.shell("kill $(cat /tmp/background)")


def test_files_go_in_and_out(guest: Guest) -> None:
    content = os.urandom(MIB)
    guest.put("/tmp/new/file", content, mode=0o600)
    assert guest.get("/tmp/new/file") == content
    with pytest.raises(GuestError, match=r"/tmp/none.*FileNotFoundError"):
        guest.get("/tmp/none")


def test_volumes_with_one_and_three_replicas_keep_what_is_written(guest: Guest) -> None:
    service = Service(guest, f"{DATA}/boot")
    guest.shell("head -c 16M /dev/urandom >/tmp/written")
    for name, replicas in (("one", "1"), ("three", "3")):
        service.blockd("volume", "create", name, "--size", "16M", "--replicas", replicas)
        view = service.blockd("volume", "attach", name, "--frontend", "socket")
        uri = view["nbd_uri"]
        guest.run("nbdcopy", "--flush", "/tmp/written", uri)
        guest.run("nbdcopy", uri, "/tmp/read")
        guest.shell("cmp /tmp/written /tmp/read; rm /tmp/read")
        assert view["health"] == "healthy"
        service.blockd("volume", "detach", name)
    service.stop()
    guest.shell(f"rm -r {DATA}/boot /tmp/written")


def test_a_power_cut_loses_what_was_not_flushed_and_a_panic_is_told(
    own_guest: Callable[..., Guest],
) -> None:
    own = own_guest(memory_mib=512, disks={"data": 64 * MIB})
    own.shell("mkfs.ext4 -q /dev/vdb; mkdir /mnt/d; mount -o commit=300 /dev/vdb /mnt/d")
    own.shell("cd /mnt/d; echo kept >kept; sync; echo lost >lost")
    own.power_cut()
    with pytest.raises(GuestError, match=r"is off.*boot\(\) comes first"):
        own.run("true")
    own.boot()
    own.shell("mkdir /mnt/d; mount /dev/vdb /mnt/d")  # root is fresh
    assert own.run("ls", "/mnt/d").out == "kept\nlost+found\n"
    assert own.get("/mnt/d/kept") == b"kept\n"

    with pytest.raises(GuestError, match=r"the guest ended at .*(?s:.)*sysrq triggered crash"):
        own.shell("echo c >/proc/sysrq-trigger")
    assert own.pid is None


def test_a_guest_that_hangs_is_told(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GRACE_SECONDS", 0.5)
    assert guest.pid
    os.kill(guest.pid, signal.SIGSTOP)
    try:
        with pytest.raises(GuestError, match=r"did not answer within 1 s at 'true'(?s:.)*console"):
            guest.run("true", timeout_seconds=0.5)
    finally:
        os.kill(guest.pid, signal.SIGCONT)
    monkeypatch.undo()
    guest.run("true")


def test_a_guest_that_does_not_boot_is_told(guest_image: Image) -> None:
    with temporary_directory() as directory:
        root = directory / "empty"
        root.write_bytes(bytes(MIB))
        with pytest.raises(
            GuestError, match=r"the guest ended at 'boot'(?s:.)*Unable to mount root"
        ):
            Guest(directory, Image(guest_image.kernel, root))


def test_systemd_runs_units(own_guest: Callable[..., Guest]) -> None:
    own = own_guest(init="systemd", disks={"data": 64 * MIB})
    assert own.run("cat", "/proc/1/comm").out == "systemd\n"
    assert own.shell("systemctl is-system-running --wait || systemctl --failed") == "running\n"
    own.run(
        "systemd-run",
        "--wait",
        "--unit=one",
        "sh",
        "-c",
        "echo done >/run/one",
        timeout_seconds=120,
    )
    assert own.get("/run/one") == b"done\n"
    own.shell("mkfs.ext4 -q -L tried /dev/vdb; udevadm trigger --settle /dev/vdb")
    own.shell("test -b /dev/disk/by-label/tried")
