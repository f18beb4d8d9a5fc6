"""Proves that the units carry a node: in a machine with systemd as first process, the node service
confined as the unit says makes devices and mounts for all of the machine; a restart, a stop and a
kill of the service cost those who write nothing; after a reboot everything is as it was; udev
leaves volumes alone.

What stands for the installation is a program in /usr/local/bin that runs the source tree. The root
file system is fresh at every boot, so the units are installed again; the home is on a disk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.machine import Guest
from tests.guest.service import Service

HOME = "/data/home"
MEMORY_MIB = 2048
DISK_BYTES = 8 << 30
SYSTEMCTL_SECONDS = 300.0  # a start waits until all volumes are attached
SHUTDOWN_SECONDS = 180.0
WAIT_SECONDS = 120.0
POLL_SECONDS = 0.2
VOLUMES = {"nbd": ("2", "ext4"), "ublk": ("1", "xfs"), "fuse": ("1", "ext4")}  # replicas, fs
ROUNDS = 5  # after each event, so many more writes are synced
PF_MEMALLOC_NOIO = 0x00080000  # include/linux/sched.h; set by PR_SET_IO_FLUSHER
CAP_SYS_MODULE = 16  # include/uapi/linux/capability.h

PROGRAM = b"""#!/bin/sh
export PYTHONPATH=/src:/opt/python
exec python3 -m blockd "$@"
"""

# Appends lines to FILE in each directory, syncs each, counts in COUNT. Ends with what went wrong.
WRITER = b"""
import os, sys, time
count, *directories = sys.argv[1:]
files = [os.open(f"{path}/lines", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in directories]
number = 0
while not os.path.exists(f"{count}.stop"):
    for file in files:
        os.write(file, f"{number:08}\\n".encode())
        os.fsync(file)
    number += 1
    with open(f"{count}.new", "w") as text:
        text.write(str(number))
    os.rename(f"{count}.new", count)
    time.sleep(0.5)
"""


class Unit(Service):
    """The node service as a unit of the guest's systemd."""

    def start(self) -> None:
        """Install the units, enable and start the service; it is ready then."""
        guest = self.guest
        guest.put("/usr/local/bin/blockd", PROGRAM, mode=0o755)
        guest.shell(
            f"""mkdir -p /data
            grep -q /data /etc/fstab 2>/dev/null || echo '/dev/vdb /data ext4' >>/etc/fstab
            systemctl daemon-reload
            mount /data
            /usr/local/bin/blockd node install --home {self.home}
            systemctl daemon-reload
            udevadm control --reload""",
            timeout_seconds=SYSTEMCTL_SECONDS,
        )
        self.systemctl("enable", "--now", "blockd")

    def systemctl(self, *words: str) -> str:
        """`systemctl WORDS`; the journal of the service is in the error if it fails."""
        done = self.guest.run("systemctl", *words, timeout_seconds=SYSTEMCTL_SECONDS, check=False)
        assert done.code == 0, f"{words}: {done.out}{done.err}{self.journal()}"
        return done.out

    def journal(self) -> str:
        """What the service has said."""
        return self.guest.run("journalctl", "--no-pager", "-u", "blockd").out

    def main_pid(self) -> int:
        """The node service's process, 0 if there is none."""
        return int(self.systemctl("show", "-P", "MainPID", "blockd"))

    def daemons(self) -> dict[int, str]:
        """Processes of the data path and what they are; not the spare one, which serves nothing."""
        listed = self.guest.run("pgrep", "-af", "blockd daemon (volume|replica) |^nbdfuse ").out
        lines = [line.partition(" ") for line in listed.splitlines()]
        return {int(pid): what for pid, _, what in lines}


class Writer:
    """A program that writes to mounted volumes; `check` sees that it goes on."""

    def __init__(self, guest: Guest, directories: list[str]) -> None:
        self.guest = guest
        self.directories = directories
        guest.put("/run/writer.py", WRITER)
        guest.shell(
            f"python3 /run/writer.py /run/count {' '.join(directories)} >/run/said 2>&1 & "
            "echo $! >/run/writer.pid"
        )
        until(lambda: guest.run("test", "-e", "/run/count", check=False).code == 0, self.said)

    def said(self) -> str:
        return self.guest.get("/run/said").decode()

    def count(self) -> int:
        return int(self.guest.get("/run/count"))

    def check(self) -> None:
        """It goes on, without an error."""
        before = self.count()
        until(lambda: self.count() >= before + ROUNDS or self.said() != "", "the writer goes on")
        assert self.said() == ""

    def stop(self) -> int:
        """End it; how many lines were synced in each file."""
        self.guest.shell(
            "touch /run/count.stop; while kill -0 $(cat /run/writer.pid) 2>/dev/null; "
            "do sleep 0.1; done"
        )
        assert self.said() == ""
        return self.count()


def until(condition: Callable[[], bool], what: object, seconds: float = WAIT_SECONDS) -> None:
    """Wait for something; what has not come is in the error."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what() if callable(what) else what}")
        time.sleep(POLL_SECONDS)


@pytest.mark.long
def test_volumes_live_through_all_that_systemd_does_to_the_service(
    own_guest: Callable[..., Guest],
) -> None:
    guest = own_guest(init="systemd", memory_mib=MEMORY_MIB, disks={"data": DISK_BYTES})
    note("up")
    guest.shell("mkfs.ext4 -q /dev/vdb")
    service = Unit(guest, HOME)
    note("started")
    check_confinement(service)
    mounts = {name: make_volume(service, name) for name in VOLUMES}
    note("mounted")
    check_system(service)
    check_daemons(service)
    service.blockd("snapshot", "create", "ublk@one", "--freeze")
    check_udev(service)
    note("udev")

    writer = Writer(guest, list(mounts.values()))
    check_events(service, writer)
    written = writer.stop()
    for path in mounts.values():
        guest.shell(f"echo end >{path}/not-synced")
    service.blockd("volume", "umount", "fuse")
    service.blockd("volume", "detach", "fuse")  # a shutdown with it takes 90 s longer
    del mounts["fuse"]
    note("detached")
    console = shut_down(guest)
    assert "I/O error" not in console
    assert "EXT4-fs" not in console
    note("shut down")

    guest.boot()
    note("up again")
    service.start()
    note("started again")
    check_content(service, mounts, written)
    check_system(service)


def check_events(service: Unit, writer: Writer) -> None:
    """Whatever becomes of the service, the same daemons serve on, and the writer sees no error."""
    daemons = service.daemons()
    for event in (
        ("restart", "blockd"),
        ("kill", "--kill-whom=main", "--signal=KILL", "blockd"),
        ("stop", "blockd"),
        ("start", "blockd"),
    ):
        pid = service.main_pid()
        service.systemctl(*event)
        until(lambda pid=pid: service.main_pid() != pid, service.journal)  # type: ignore[misc]
        writer.check()
        if event[0] != "stop":
            until_ready(service)
        assert service.daemons() == daemons, event
        note(" ".join(event))
    check_system(service)


def check_content(service: Unit, mounts: dict[str, str], written: int) -> None:
    """Volumes are attached and mounted where they were, with what was written, synced or not."""
    for name, path in mounts.items():
        view = service.blockd("volume", "show", name)
        assert view["state"] == "attached"
        assert service.guest.run("findmnt", "-no", "SOURCE", path).out.strip() == view["device"]
        lines = service.guest.get(f"{path}/lines").decode().splitlines()
        assert lines == [f"{number:08}" for number in range(written)]
        assert service.guest.get(f"{path}/not-synced") == b"end\n"


def make_volume(service: Unit, frontend: str) -> str:
    """A volume named by its front end, with a file system; where it is mounted."""
    replicas, fs = VOLUMES[frontend]
    service.blockd("volume", "create", frontend, "--size", "400M", "--replicas", replicas)
    wait = ("--timeout", "110")
    service.blockd("volume", "attach", frontend, "--frontend", frontend, *wait)
    view = service.blockd("volume", "mount", frontend, "--fs", fs, *wait)
    path = str(view["mount"]["path"])
    found = service.guest.run("findmnt", "-no", "SOURCE,FSTYPE", path).out.split()
    assert found == [view["device"], fs]  # seen by all of the machine
    return path


def until_ready(service: Unit) -> None:
    """The unit is active, and has been told so by the service."""
    until(
        lambda: service.guest.run("systemctl", "is-active", "blockd", check=False).code == 0,
        service.journal,
    )


def check_system(service: Unit) -> None:
    """The unit is active, and no unit of the machine has failed."""
    until_ready(service)
    assert service.systemctl("--failed", "--no-legend", "--plain") == ""


def check_confinement(service: Unit) -> None:
    """System calls and capabilities are cut down; mounts are the machine's."""
    pid = service.main_pid()
    status = service.guest.get(f"/proc/{pid}/status").decode()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert facts["Seccomp"] == "2"
    assert facts["NoNewPrivs"] == "1"
    assert not int(facts["CapBnd"], 16) >> CAP_SYS_MODULE & 1
    spaces = service.guest.run("readlink", f"/proc/{pid}/ns/mnt", "/proc/1/ns/mnt").out.split()
    assert spaces[0] == spaces[1]


def check_daemons(service: Unit) -> None:
    """The daemons could do what they need when memory is short (blockd/daemons/memory.py)."""
    daemons = {pid: what for pid, what in service.daemons().items() if "blockd" in what}
    assert len(daemons) >= len(VOLUMES)
    for pid, what in daemons.items():
        status = service.guest.get(f"/proc/{pid}/status").decode()
        locked = next(line.split()[1] for line in status.splitlines() if "VmLck" in line)
        assert int(locked) > 0, what
        assert service.guest.get(f"/proc/{pid}/oom_score_adj") == b"-1000\n", what
        flags = service.guest.get(f"/proc/{pid}/stat").decode().rpartition(") ")[2].split()[6]
        assert int(flags) & PF_MEMALLOC_NOIO, what


def check_udev(service: Unit) -> None:
    """A program that closes a volume's device after writing causes no event; any other does."""
    guest = service.guest
    devices = [service.blockd("volume", "show", name)["device"] for name in VOLUMES]
    names = [Path(device).name for device in devices]
    guest.shell(
        "udevadm settle; udevadm monitor --udev --subsystem-match=block >/run/events 2>&1 & "
        "echo $! >/run/monitor.pid"
    )
    until(lambda: b"UDEV" in guest.get("/run/events"), "the monitor runs")
    for device in (*devices, "/dev/vdb"):
        guest.shell(f"exec 3<>{device}; exec 3>&-")
    until(lambda: b"/vdb " in guest.get("/run/events"), "the event of another device")
    guest.shell("udevadm settle; kill $(cat /run/monitor.pid)")
    events = guest.get("/run/events").decode()
    assert not [line for line in events.splitlines() if any(f"/{x} " in line for x in names)]
    links = guest.shell("find /dev/disk -type l -printf '%l\\n'")
    assert "vdb" in links
    assert not [link for link in links.splitlines() if Path(link).name in names]


def shut_down(guest: Guest) -> str:
    """An orderly shutdown; the end of the console."""
    guest.shell("systemctl reboot --no-block")
    until(lambda: guest.pid is None, guest.console_tail, SHUTDOWN_SECONDS)
    return guest.console_tail()


def note(what: str) -> None:
    print(f"{time.monotonic():.0f} {what}", file=sys.stderr, flush=True)
