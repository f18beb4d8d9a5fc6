"""Starts the daemons, finds them again, watches that they live, and stops them.

Daemons are processes of their own (own session, log to a file): the node service may end, be
killed or replaced while they serve. What runs is found through the control sockets, then through
pid files; memory is only a cache of that. So one daemon is never started twice, and a daemon that
is alive but does not answer is waited for and not replaced.

Life is watched through pidfds: they work for processes that are not our children, and a reused
pid cannot be taken for a daemon. A daemon that ends wakes the reconciler of its volume; one that
ends soon after each start is started again at growing distances (`RESTART_SECONDS_MAX`).

While somebody waits for volume daemons with I/O under way, a spare process with all modules loaded
is kept (blockd/daemons/spare.py): it becomes the next volume daemon at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blockd.frontends.processes import has_ended
from blockd.node import control
from blockd.node.control import Answer
from protocol.errors import (
    BlockdError,
    ConflictError,
    LostWritesError,
    NotFoundError,
    PeerError,
    RequestError,
    StateError,
)

START_SECONDS = 30.0  # opening after a crash reads the dirty zones first
STOP_SECONDS = 30.0  # a clean stop flushes what the page cache holds
TERMINATE_SECONDS = 10.0
REPLACE_SECONDS = 90.0  # a successor gives up before that
HUNG_SECONDS = 2.0  # a loop that serves answers within milliseconds
POLL_SECONDS = 0.02  # between looks at a daemon that starts; it takes about 0.2 s
QUICK_END_SECONDS = 10.0  # a daemon that ends sooner than this counts as failing to start
RESTART_SECONDS_MAX = 30.0
LOG_BYTES_MAX = 1 << 20  # an older log is kept once, as .1
LOG_TAIL_BYTES = 8192

SPARE_ROOM_BYTES = 4096  # on its command line, for that of the daemon it becomes

_DAEMON = (sys.executable, "-m", "blockd", "daemon")
_ERROR_PREFIX = "blockd: "  # of the one line a daemon says when it ends in error

_EXIT_FAMILIES: dict[int, type[BlockdError]] = {
    family.exit_code: family
    for family in (RequestError, NotFoundError, ConflictError, LostWritesError)
}


@dataclass(frozen=True)
class DaemonSpec:
    """One daemon: how to start it and how to know it again.

    `arguments` follow `blockd daemon`; `identity` is a field of its status and its value; `program`
    is the Python of the installation to run.
    """

    key: str
    volume: str
    arguments: tuple[str, ...]
    control: Path
    log: Path
    pid_file: Path
    identity: tuple[str, str]
    program: str = sys.executable


@dataclass(frozen=True)
class Ended:
    """How a daemon ended; `code` is None if it was not our child."""

    code: int | None
    message: str


@dataclass
class _Process:
    spec: DaemonSpec
    pid: int
    pidfd: int
    child: subprocess.Popen[bytes] | None
    started: float
    replaced: bool = False  # its successor has taken over, or is about to
    answered: bool = False  # it has started: silence from now on means that it hangs
    gone: threading.Event = field(default_factory=threading.Event)


class Supervisor:
    """All daemons of this node."""

    def __init__(self, on_end: Callable[[str], None]) -> None:
        self._on_end = on_end
        self._lock = threading.Lock()
        self._processes: dict[str, _Process] = {}
        self._ended: dict[str, Ended] = {}
        self._failures: dict[str, tuple[int, float]] = {}
        self._poll = select.epoll()
        self._by_fd: dict[int, _Process] = {}
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        self._closing = False
        self._spare: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; the daemons go on."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        spare = self._take_spare()
        if spare is not None and spare.stdin is not None:
            spare.stdin.close()
            spare.wait()

    def is_watching(self) -> bool:
        """Whether a daemon that ends is noticed."""
        return self._thread.is_alive()

    def pid(self, spec: DaemonSpec) -> int | None:
        """The pid if the daemon runs, started by us or found."""
        process = self._process(spec) or self._adopt(spec)
        return process.pid if process else None

    def ended(self, spec: DaemonSpec) -> Ended | None:
        """How it ended last, None if it has not ended since it was last forgotten."""
        return self._ended.get(spec.key)

    def forget(self, spec: DaemonSpec) -> None:
        """Forget past failures, because someone asks for a fresh start."""
        self._ended.pop(spec.key, None)
        self._failures.pop(spec.key, None)

    def launch(self, spec: DaemonSpec) -> None:
        """See to it that the daemon runs, without waiting until it answers."""
        if self.pid(spec) is not None:
            return
        count, not_before = self._failures.get(spec.key, (0, 0.0))
        if time.monotonic() < not_before:
            last = self._ended.get(spec.key)
            raise _restart_error(spec, last, count, not_before - time.monotonic())
        self._start(spec)

    def ready(self, spec: DaemonSpec) -> Answer:
        """Wait until a launched daemon answers; its status. One that hangs is not waited for."""
        while True:
            process = self._process(spec)
            if process is None:
                raise _end_error(spec, self._ended.get(spec.key))
            deadline = process.started + START_SECONDS
            try:
                answer = control.status(spec.control, HUNG_SECONDS)
            except PeerError as error:
                if process.answered or time.monotonic() > deadline:
                    raise PeerError(
                        f"{spec.key} (pid {process.pid}) runs but does not answer: {error}; "
                        f"see {spec.log}"
                    ) from None
                process.gone.wait(POLL_SECONDS)
                continue
            process.answered = True
            field_name, value = spec.identity
            if answer.get(field_name) != value:
                raise ConflictError(
                    f"another daemon ({field_name} {answer.get(field_name)}) answers at "
                    f"{spec.control} where {value} belongs; stop it (pid {answer.get('pid')})"
                )
            return answer

    def ensure(self, spec: DaemonSpec) -> Answer:
        """Launch and wait."""
        self.launch(spec)
        return self.ready(spec)

    def replace(self, spec: DaemonSpec) -> Answer:
        """Have a successor take over from a running volume daemon; its status.

        On an error, the successor's own, the old one goes on.
        """
        old = self._process(spec) or self._adopt(spec)
        if old is None:
            raise PeerError(f"the {spec.key} has just ended")
        _rotate(spec.log)
        begin = _size(spec.log)
        child = self._spawn(spec, "--take-over")
        deadline = time.monotonic() + REPLACE_SECONDS
        old.replaced = True  # its end is no failure
        while child.poll() is None:
            with contextlib.suppress(PeerError):
                answer = control.status(spec.control, HUNG_SECONDS)
                if answer.get("pid") == child.pid:
                    process = self._track(spec, child.pid, child)
                    assert process is not None, "not collected yet"
                    process.answered = True
                    return answer
            if time.monotonic() > deadline:
                child.kill()
            time.sleep(POLL_SECONDS)
        old.replaced = False
        if old.gone.is_set():
            self._on_end(spec.volume)
        words = _said_since(spec.log, begin) or f"it ended with code {child.returncode}"
        family = _EXIT_FAMILIES.get(child.returncode, StateError)
        raise family(f"the successor of the {spec.key} did not take over: {words}")

    def stop(self, spec: DaemonSpec) -> None:
        """Stop the daemon cleanly, harder if it does not listen; fine if it does not run."""
        process = self._process(spec) or self._adopt(spec)
        if process is None:
            return
        with contextlib.suppress(BlockdError):
            control.ask(spec.control, "stop", timeout_seconds=TERMINATE_SECONDS)
            if process.gone.wait(STOP_SECONDS):
                self.forget(spec)
                return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, OSError):
                signal.pidfd_send_signal(process.pidfd, number)
            if process.gone.wait(TERMINATE_SECONDS):
                self.forget(spec)
                return
        raise StateError(
            f"{spec.key} (pid {process.pid}) does not end, not even when killed; "
            "its disk may hang: see the kernel log"
        )

    def keep_spare(self, spec: DaemonSpec) -> None:
        """See that a spare process waits to become the next volume daemon, such as this one."""
        if spec.program != sys.executable:
            return
        with self._lock:
            if self._closing or (self._spare is not None and self._spare.poll() is None):
                return
            self._spare = subprocess.Popen(
                [*_DAEMON, "spare", " " * SPARE_ROOM_BYTES],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )

    def _take_spare(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            spare, self._spare = self._spare, None
        return spare

    def _spare_as(self, spec: DaemonSpec) -> subprocess.Popen[bytes] | None:
        """Have the spare process become this daemon; None if there is none."""
        if spec.arguments[0] != "volume" or spec.program != sys.executable:
            return None
        spare = self._take_spare()
        if spare is None:
            return None
        order = {"arguments": spec.arguments, "log": str(spec.log)}
        try:
            assert spare.stdin is not None
            spare.stdin.write(json.dumps(order).encode() + b"\n")
            spare.stdin.close()
        except OSError:  # it has ended
            spare.wait()
            return None
        return spare

    def _process(self, spec: DaemonSpec) -> _Process | None:
        with self._lock:
            process = self._processes.get(spec.key)
        return None if process is None or process.gone.is_set() else process

    def _adopt(self, spec: DaemonSpec) -> _Process | None:
        """Find a daemon that runs without us having started it."""
        pid = None
        try:
            answer = control.status(spec.control)
            if answer.get(spec.identity[0]) == spec.identity[1]:
                pid = int(answer["pid"])
        except (BlockdError, KeyError, ValueError):
            pid = _pid_from_file(spec)
        if pid is None:
            return None
        return self._track(spec, pid, None)

    def _start(self, spec: DaemonSpec) -> None:
        _rotate(spec.log)
        child = self._spare_as(spec) or self._spawn(spec)
        # The daemon does the same once it serves; until then a new node service finds it by this.
        spec.pid_file.write_text(f"{child.pid}\n")
        self._ended.pop(spec.key, None)
        self._track(spec, child.pid, child)

    @staticmethod
    def _spawn(spec: DaemonSpec, *more: str) -> subprocess.Popen[bytes]:
        fd = os.open(spec.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                [spec.program, "-m", "blockd", "daemon", *spec.arguments, *more],
                stdin=subprocess.DEVNULL,
                stdout=fd,
                stderr=fd,
                start_new_session=True,
                cwd="/",
            )
        except OSError as error:
            raise NotFoundError(
                f"{spec.program} cannot be run for the {spec.key}: {error.strerror}; name the "
                "Python of an installation of blockd"
            ) from None
        finally:
            os.close(fd)

    def _track(
        self, spec: DaemonSpec, pid: int, child: subprocess.Popen[bytes] | None
    ) -> _Process | None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if child is None and has_ended(pidfd):
            os.close(pidfd)  # it has ended and nobody has collected it yet
            return None
        process = _Process(spec, pid, pidfd, child, time.monotonic())
        with self._lock:
            self._processes[spec.key] = process
            self._by_fd[pidfd] = process
            self._poll.register(pidfd, select.EPOLLIN)
        return process

    def _watch(self) -> None:
        while not self._closing:
            for fd, _ in self._poll.poll():
                if fd == self._wake:
                    continue
                with self._lock:
                    process = self._by_fd.pop(fd)
                    self._poll.unregister(fd)
                self._note_end(process)

    def _note_end(self, process: _Process) -> None:
        spec = process.spec
        code = process.child.wait() if process.child is not None else None
        if process.replaced:
            process.gone.set()
            os.close(process.pidfd)
            return
        self._ended[spec.key] = Ended(code, _last_words(spec.log, code))
        count, _ = self._failures.get(spec.key, (0, 0.0))
        now = time.monotonic()
        quick = code is not None and now - process.started < QUICK_END_SECONDS
        if quick and code != -signal.SIGKILL:
            wait = min(RESTART_SECONDS_MAX, float(2**count))
            self._failures[spec.key] = (count + 1, now + wait)
        else:
            self._failures.pop(spec.key, None)
        with self._lock:
            if self._processes.get(spec.key) is process:
                del self._processes[spec.key]
        process.gone.set()
        os.close(process.pidfd)
        self._on_end(spec.volume)


def _pid_from_file(spec: DaemonSpec) -> int | None:
    """The pid in the daemon's pid file, if that process is this daemon."""
    try:
        pid = int(spec.pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(f"unix:{spec.control}") in words else None


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _said_since(log: Path, begin: int) -> str:
    """The last error line that a daemon added to the log."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.removeprefix(_ERROR_PREFIX) for line in lines if line.startswith(_ERROR_PREFIX)]
    return said[-1] if said else ""


def _rotate(log: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > LOG_BYTES_MAX:
            log.rename(log.with_name(log.name + ".1"))


def _last_words(log: Path, code: int | None) -> str:
    """Why a daemon ended: its error line at the end of the log, or what its exit code tells."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line for line in reversed(lines) if line.strip()), "")
    if last.startswith(_ERROR_PREFIX):
        return last.removeprefix(_ERROR_PREFIX)
    if code is not None and code < 0:
        return f"it was killed by signal {-code}"
    return "it ended without a word" if code is None else f"it ended with code {code}"


def _end_error(spec: DaemonSpec, ended: Ended | None) -> BlockdError:
    code = ended.code if ended else None
    family = _EXIT_FAMILIES.get(code or 0, StateError)
    words = ended.message if ended else "no reason is known"
    return family(f"{spec.key} ended: {words} (log: {spec.log})")


def _restart_error(
    spec: DaemonSpec, ended: Ended | None, count: int, wait_seconds: float
) -> BlockdError:
    words = ended.message if ended else ""
    return StateError(
        f"{spec.key} ended soon after {count} starts in a row: {words}; "
        f"next try in {wait_seconds:.0f} s (log: {spec.log})"
    )
