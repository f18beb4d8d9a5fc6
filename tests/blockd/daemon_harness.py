"""Real daemons for tests: started in a directory of the test's own, ended by pid."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 30.0


def poll(what: str, probe: Callable[[], Any], seconds: float = DEADLINE_SECONDS) -> Any:
    """The first true value of `probe`, or an AssertionError that names `what`."""
    deadline = time.monotonic() + seconds
    while True:
        value = probe()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class Daemon:
    """One daemon process with its control socket and log."""

    def __init__(self, name: str, arguments: list[str], directory: Path) -> None:
        self.control = directory / f"{name}.ctl"
        self.log = directory / f"{name}.log"
        self.arguments = arguments
        if "--control" not in arguments:
            self.arguments = [arguments[0], "--control", f"unix:{self.control}", *arguments[1:]]
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-m", "blockd", "daemon", *self.arguments]

    def launch(self) -> None:
        """Start it, and do not wait."""
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def start(self) -> Daemon:
        """Start it and wait for its ready line."""
        self.launch()
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready"), f"{self.arguments}: {self.log.read_text()}"
        return self

    def refused(self) -> tuple[int, str]:
        """Start it where it must not come up: its exit code and its one line on stderr."""
        done = subprocess.run(
            self.command(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        assert not done.stdout, done.stdout
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("blockd: ")]
        assert len(errors) == 1, done.stderr
        assert lines[-1] == errors[0], done.stderr
        assert "Traceback" not in done.stderr
        return done.returncode, errors[0]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE_SECONDS)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def ask(self, command: str, **content: Any) -> dict[str, Any]:
        """One control command; the whole answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_SECONDS)
            sock.connect(str(self.control))
            sock.sendall(json.dumps({"command": command, **content}).encode() + b"\n")
            with sock.makefile("rb") as lines:
                answer: dict[str, Any] = json.loads(lines.readline())
        return answer

    def must(self, command: str, **content: Any) -> dict[str, Any]:
        answer = self.ask(command, **content)
        assert answer["ok"], answer
        return answer


class Cluster:
    """One volume daemon and its replicas, all on unix sockets.

    With `local` the volume daemon serves the only replica itself, from its directory.
    """

    def __init__(
        self, directory: Path, replicas: int = 3, size: str = "256M", local: bool = False
    ) -> None:
        self.directory = directory
        self.nbd = directory / "nbd.sock"
        self.local = local
        self.replicas = [self.replica_daemon(number, size) for number in range(replicas)]
        addresses = [self.replica_address(number) for number in range(replicas)]
        self.volume = self.volume_daemon(addresses, directory / "state.db")

    def replica_address(self, number: int) -> str:
        if self.local:
            return f"dir:{self.directory}/replica{number}"
        return f"unix:{self.directory}/r{number}.sock"

    def replica_daemon(self, number: int, size: str) -> Daemon:
        """Replica `number`, made when it starts first."""
        path, listen = self.directory / f"replica{number}", self.directory / f"r{number}.sock"
        create = ["--create", "--size", size]
        words = ["replica", str(path), "--listen", f"unix:{listen}", *create]
        return Daemon(f"r{number}", words, self.directory)

    def volume_daemon(self, addresses: list[str], state: Path, name: str = "v") -> Daemon:
        """A volume daemon of these replicas."""
        replicas = [word for address in addresses for word in ("--replica", address)]
        words = ["volume", "vol", *replicas, "--nbd", f"unix:{self.nbd}", "--state", str(state)]
        return Daemon(name, words, self.directory)

    def start(self) -> Cluster:
        for replica in self.replicas:
            replica.start()
            if self.local:
                replica.end()
        self.volume.start()
        return self

    def uri(self, snapshot: str = "") -> str:
        export = f"vol@{snapshot}" if snapshot else "vol"
        return f"nbd+unix:///{export}?socket={self.nbd}"

    def status(self) -> dict[str, Any]:
        return self.volume.must("status")

    def member(self, number: int) -> dict[str, Any]:
        """What the volume daemon says of replica `number`."""
        address = self.replica_address(number)
        return next(m for m in self.status()["members"] if m["address"] == address)

    def rebuild(self, number: int) -> None:
        """Wait until a member that came back is in sync again, which needs no request."""
        poll("in sync", lambda: self.member(number)["state"] == "IN_SYNC")

    def end(self) -> None:
        for daemon in [self.volume, *self.replicas]:
            if daemon.alive():
                daemon.end(signal.SIGTERM)
            elif daemon.process is not None and daemon.process.stdout is not None:
                daemon.process.stdout.close()


@contextmanager
def cluster(
    directory: Path, replicas: int = 3, size: str = "256M", local: bool = False
) -> Iterator[Cluster]:
    """A running cluster, ended by pid whatever happens."""
    assert len(str(directory)) < 80, "unix socket paths are short"
    made = Cluster(directory, replicas, size, local)
    try:
        yield made.start()
    finally:
        made.end()
        for daemon in [made.volume, *made.replicas]:
            if daemon.alive():
                os.kill(daemon.pid, signal.SIGKILL)
