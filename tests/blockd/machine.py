"""A machine that can lose its power: `blockd serve`, its daemons, mounts and /run in namespaces of
their own (processes, mounts), with a boot id of its own.

Killing the first process ends all others at once and takes the mounts and /run with it, as a power
cut does. What stays is what a disk keeps, and what the kernel shares among namespaces: loop
devices, which are detached here. Process ids begin anew with each boot, so pid files name others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from blockd.client import Client
from blockd.frontends import tools
from tests.blockd.node_harness import WAIT_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]

# $1 home, $2 boot id file, $3 what to run first, $4 python. After an orderly end of the node
# service all ext4 file systems are unmounted, as the machine's own service manager would do.
_INIT = """
mount --bind "$2" /proc/sys/kernel/random/boot_id && mount -t tmpfs tmpfs /run || exit 1
eval "$3"
"$4" -m blockd --home "$1" serve >>"$1/serve.log" 2>&1 &
echo $! >"$1/serve.pid"
wait
umount --all --types ext4
touch "$1/down"
exec sleep 1000
"""


def reason_against() -> str | None:
    """Why there can be no such machine here, None if there can."""
    if os.geteuid() != 0:
        return "needs root (namespaces, mounts)"
    words = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unshare is not installed; apt-get install util-linux"
    return None if done.returncode == 0 else f"no namespaces here: {done.stderr.strip()}"


class Machine:
    """One home, one boot after another."""

    def __init__(self, root: Path) -> None:
        self.home = root / "home"
        self.home.mkdir()
        self._boot_id = root / "boot_id"
        self._outer: subprocess.Popen[bytes] | None = None
        self._init = 0

    def boot(self, first: str = "true") -> None:
        """Begin another boot; returns when the node service answers."""
        assert self._outer is None
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        (self.home / "down").unlink(missing_ok=True)
        (self.home / "serve.log").write_bytes(b"")
        words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        words += ["sh", "-c", _INIT, "sh", str(self.home), str(self._boot_id), first]
        self._outer = subprocess.Popen(
            [*words, sys.executable],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        until(lambda: children.read_text().split(), "the first process runs")
        self._init = int(children.read_text().split()[0])
        until(lambda: "node service ready" in self.log(), f"ready: {self.log()}")

    def log(self) -> str:
        """What the node service has said in this boot."""
        return (self.home / "serve.log").read_text()

    def inside(self, path: str | Path) -> Path:
        """A path as the machine sees it."""
        return Path(f"/proc/{self._init}/root{path}")

    def run(self, *words: str) -> str:
        """Run a program in the machine, which must succeed; what it printed."""
        enter = ["nsenter", "--target", str(self._init), "--mount", "--pid", "--root", "--wd"]
        done = subprocess.run(
            [*enter, *words], capture_output=True, text=True, timeout=WAIT_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def blockd(self, *words: str) -> Any:
        """Run one command, which must succeed; its JSON answer."""
        done = subprocess.run(
            [sys.executable, "-m", "blockd", "--home", str(self.home), *words, "-o", "json"],
            capture_output=True,
            text=True,
            timeout=2 * WAIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def view(self, volume: str) -> Any:
        """The volume now."""
        with Client.over_unix(self.home) as client:
            return client.volume(volume)

    def mounts(self) -> dict[str, str]:
        """Mount points of the machine and what is mounted there."""
        lines = Path(f"/proc/{self._init}/mounts").read_text().splitlines()
        return {line.split()[1]: line.split()[0] for line in lines}

    def commands(self) -> list[str]:
        """The command lines of all processes of the machine."""
        found = []
        for entry in self.inside("/proc").iterdir():
            if entry.name.isdigit():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    def shut_down(self) -> None:
        """End in order: the node service first, then the mounts, then all that runs."""
        serve = (self.home / "serve.pid").read_text().strip()
        self.run("kill", serve)
        until((self.home / "down").exists, "the mounts are gone")
        self.cut_power()

    def cut_power(self) -> None:
        """All processes, mounts and devices are gone."""
        if self._outer is None:
            return
        devices = _loops(f"{self.home}/")  # a device whose mount is gone has lost that name
        os.kill(self._init, signal.SIGKILL)
        self._outer.wait(WAIT_SECONDS)
        self._outer = None
        for device in devices & _loops("/\n", f"{self.home}/"):
            tools.run("losetup", ["--detach", device])
        until(lambda: not devices & _loops("/\n"), "the loop devices are detached")


def _loops(*beginnings: str) -> set[str]:
    """Loop devices on files whose names begin like that."""
    found = set()
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text()
        except OSError:  # it was detached in this moment
            continue
        if backing.startswith(beginnings):
            found.add(f"/dev/{entry.parent.parent.name}")
    return found
