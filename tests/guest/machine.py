"""A QEMU machine with a real kernel, and commands run in it.

    with Guest(directory, image(), disks={"data": 4 << 30}) as guest:
        guest.shell("modprobe nbd && mkfs.ext4 -q /dev/vdb")
        guest.run("python3", "-m", "blockd", "--version").out
        guest.power_cut()
        guest.boot()

Invariants:
- The root file system and the source tree at /src are fresh at every boot; `disks` persist from
  boot to boot, as /dev/vdb and so on, in the order given.
- Every wait has a limit. A guest that panics, hangs or does not boot is a GuestError with the end
  of its console. A kernel oops is a panic.
- QEMU ends with `close`, and with the process that started it, however that ends.
- A power cut loses what the guest's kernel holds. What it has sent to a disk is there, flushed or
  not: the disk has no cache to lose.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.guest.image import REPOSITORY, Image, find, make_disk

BOOT_SECONDS_MAX = 240.0  # 10 on an idle machine; it is emulated, and the host may be busy
RUN_SECONDS = 60.0  # for a command, unless told otherwise
GRACE_SECONDS = 30.0  # the agent's answer may be so late, then the guest counts as hung
POLL_SECONDS = 0.02
CONSOLE_LINES = 100  # an oops and what led to it
SOURCE_BYTES = 256 << 20  # sparse
SOURCES = (
    *("blockd", "protocol", "replication", "snapshots", "systemd", "tests", "perf"),
    "pyproject.toml",
)
COMPILED = ("blockd", "protocol", "replication", "snapshots")
NOT_SOURCES = shutil.ignore_patterns("*_cache", ".cache", ".hypothesis")
# One thread for both processors: QEMU 7.2 runs code that another processor has just patched, and
# its cmpxchg16b destroys the flags; the kernel does without the latter.
QEMU = (
    *("-accel", "tcg,thread=single", "-cpu", "qemu64,-cx16", "-smp", "2"),
    *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
)
# Only root is an NVMe disk (its driver needs no initrd): several are named in any order.
KERNEL = "root=/dev/nvme0n1 rw console=ttyS0 loglevel=4 oops=panic panic=-1"
INIT = {"tiny": "/usr/sbin/guest-init", "systemd": "/lib/systemd/systemd"}


class GuestError(Exception):
    """The guest is gone, hangs, or did not boot; or a command in it failed."""


@dataclass(frozen=True)
class Result:
    """What a command in the guest did."""

    code: int
    out: str
    err: str


class Guest:
    """One machine, booted. `directory` holds its disks; it must exist and be its alone."""

    def __init__(
        self,
        directory: Path,
        image: Image,
        *,
        memory_mib: int = 1024,
        disks: Mapping[str, int] | None = None,
        init: str = "tiny",
    ) -> None:
        self._directory = directory
        self._image = image
        self._memory_mib = memory_mib
        self._init = INIT[init]
        self._disks: list[Path] = []
        for name, size_bytes in (disks or {}).items():
            path = directory / f"{name}.disk"
            with path.open("wb") as file:
                file.truncate(size_bytes)
            self._disks.append(path)
        self._console = directory / "console"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[dict[str, Any]]] = {}
        self._sending = threading.Lock()
        self.up_seconds = 0.0  # from the kernel's start to the agent's, by the guest's clock
        _make_source(directory / "source.disk")
        self.boot()

    def __enter__(self) -> Guest:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """QEMU's process, or None if the machine is off or has died."""
        return self._qemu.pid if self._qemu is not None and self._qemu.poll() is None else None

    def boot(self) -> None:
        """Switch on (again) and wait for the agent. Raises GuestError."""
        assert self.pid is None, "the guest is on; power_cut() comes before boot()"
        self.close()
        agent = self._directory / "agent"
        agent.unlink(missing_ok=True)
        up: Future[dict[str, Any]] = Future()
        self._waiting = {0: up}
        self._qemu = subprocess.Popen(
            # QEMU's end is bound to the thread that starts it, which is the test's.
            ["setpriv", "--pdeathsig", "KILL", *self._command()],
            cwd=self._directory,  # unix socket paths are short
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self._directory / "qemu.log").open("wb"),
        )
        try:
            self._socket = self._connected(agent)
            threading.Thread(target=self._receive, args=(self._socket,), daemon=True).start()
            self.up_seconds = self._answer(up, BOOT_SECONDS_MAX, "boot")["up_seconds"]
        except BaseException:
            self.close()
            raise

    def power_cut(self) -> None:
        """Switch off at once, as `close` does; here `boot` may follow."""
        self.close()

    def close(self) -> None:
        """Switch off; nothing of the machine runs afterwards."""
        qemu, self._qemu = self._qemu, None
        connection, self._socket = self._socket, None
        if qemu is not None:
            qemu.kill()
            qemu.wait()
        if connection is not None:
            connection.close()

    def run(
        self,
        *words: str,
        stdin: bytes = b"",
        timeout_seconds: float = RUN_SECONDS,
        check: bool = True,
    ) -> Result:
        """Run a command in /src and wait for it. Raises GuestError: over time; checked and not 0.

        Several threads may run commands at the same time. What the command leaves in the
        background goes on.
        """
        return self._run("run", words, stdin, timeout_seconds, check)

    def blockd(
        self, *words: str, timeout_seconds: float = RUN_SECONDS, check: bool = True
    ) -> Result:
        """As `run("python3", "-m", "blockd", *words)`, without importing it each time."""
        return self._run("blockd", words, b"", timeout_seconds, check)

    def shell(self, script: str, *, timeout_seconds: float = RUN_SECONDS) -> str:
        """Run a shell script that must succeed at every step; what it printed."""
        return self.run("sh", "-euc", script, timeout_seconds=timeout_seconds).out

    def put(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """Write a small file in the guest."""
        request = {"put": path, "data": _encoded(content), "mode": mode}
        self._ask(request, f"write {path}", RUN_SECONDS)

    def get(self, path: str) -> bytes:
        """Read a small file in the guest."""
        return base64.b64decode(self._ask({"get": path}, f"read {path}", RUN_SECONDS)["data"])

    def console_tail(self) -> str:
        """The last lines of the console, headed by what they are."""
        lines: list[str] = []
        if self._console.exists():
            lines = self._console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        return "\n".join((f"{self._said()}--- end of the guest's console:", *lines))

    def _run(
        self, how: str, words: tuple[str, ...], stdin: bytes, limit_seconds: float, check: bool
    ) -> Result:
        what = " ".join(words if how == "run" else ("blockd", *words))
        request = {how: words, "seconds": limit_seconds, "input": _encoded(stdin)}
        answer = self._ask(request, what, limit_seconds)
        out, err = (
            base64.b64decode(answer[key]).decode(errors="replace") for key in ("out", "err")
        )
        code = answer["code"]
        if code is None:
            tail = self.console_tail()
            raise GuestError(
                f"in the guest, {what!r} took over {limit_seconds:g} s:\n{out}{err}{tail}"
            )
        if check and code != 0:
            raise GuestError(f"in the guest, {what!r} ended with {code}:\n{out}{err}")
        return Result(code, out, err)

    def _command(self) -> list[str]:
        drives = [self._directory / "source.disk,snapshot=on", *self._disks]
        words = [
            *(find("qemu-system-x86_64") or "qemu-system-x86_64", *QEMU),
            *("-m", str(self._memory_mib), "-kernel", str(self._image.kernel)),
            *("-append", f"{KERNEL} init={self._init}", "-serial", "file:console"),
            *("-chardev", "socket,id=agent,path=agent,server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
            *("-drive", f"file={self._image.root},if=none,id=root,format=raw,snapshot=on"),
            *("-device", "nvme,drive=root,serial=root"),
        ]
        for number, drive in enumerate(drives):
            # The host does not lose power, so its page cache is as good as a disk.
            options = f"if=none,id=disk{number},format=raw,cache=unsafe,discard=unmap"
            words += ["-drive", f"file={drive},{options}"]
            words += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        return words

    def _connected(self, path: Path) -> socket.socket:
        deadline = time.monotonic() + BOOT_SECONDS_MAX
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                assert self._qemu
                if self._qemu.poll() is not None or time.monotonic() > deadline:
                    raise GuestError(f"QEMU did not start: {self._said()}") from None
                time.sleep(POLL_SECONDS)
            else:
                return connection

    def _said(self) -> str:
        return (self._directory / "qemu.log").read_text(errors="replace")

    def _ask(self, request: dict[str, Any], what: str, limit_seconds: float) -> dict[str, Any]:
        number = next(self._numbers)
        waiting: Future[dict[str, Any]] = Future()
        self._waiting[number] = waiting
        connection = self._socket
        if connection is None:
            raise GuestError(f"the guest is off: {what!r} cannot be done; boot() comes first")
        line = json.dumps({"id": number, **request}).encode() + b"\n"
        try:
            with self._sending:
                connection.sendall(line)
        except OSError:
            self.close()
            raise GuestError(f"the guest ended before {what!r}\n{self.console_tail()}") from None
        answer = self._answer(waiting, limit_seconds + GRACE_SECONDS, what)
        if "error" in answer:
            raise GuestError(f"in the guest, {what!r} failed: {answer['error']}")
        return answer

    def _answer(
        self, waiting: Future[dict[str, Any]], limit_seconds: float, what: str
    ) -> dict[str, Any]:
        try:
            return waiting.result(limit_seconds)
        except TimeoutError:
            why = f"did not answer within {limit_seconds:g} s"
        except ConnectionError:
            self.close()  # QEMU closes the connection a moment before it is gone
            why = "ended"
        raise GuestError(f"the guest {why} at {what!r}\n{self.console_tail()}")

    def _receive(self, connection: socket.socket) -> None:
        """In a thread per boot: answers to those who wait, until the connection ends."""
        waiting = self._waiting
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    waiting.pop(answer["id"]).set_result(answer)
        except OSError:
            pass  # closed by close()
        for left in list(waiting.values()):
            left.set_exception(ConnectionError())


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _make_source(target: Path) -> None:
    """A disk with the source tree as it is now.

    Compiled, because that takes half a minute in the guest; another version of Python ignores it.
    """
    with tempfile.TemporaryDirectory(prefix="guest-source-") as staging:
        for name in SOURCES:
            path = REPOSITORY / name
            if path.is_dir():
                shutil.copytree(path, Path(staging) / name, ignore=NOT_SOURCES)
            elif path.exists():
                shutil.copy(path, staging)
        words = (*("-m", "compileall", "-q", "-s", staging, "-p", "/src"), *COMPILED)
        subprocess.run([sys.executable, *words], cwd=staging, check=True)
        make_disk(Path(staging), target, SOURCE_BYTES)
