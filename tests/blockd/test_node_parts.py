"""Proves the parts of the node service that stand alone: the work queue, the home directory, the
control client and the supervisor."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.node import control
from blockd.node.home import Home
from blockd.node.reconcile import Workers, WorkQueue
from blockd.node.server import tcp_socket
from blockd.node.service import NodeService
from blockd.node.supervisor import DaemonSpec, Supervisor
from protocol.errors import ConflictError, PeerError, RequestError, StorageError
from tests.blockd.node_harness import MIB, NodeHarness, until

# -- work queue ---------------------------------------------------------------------------------


def test_many_wishes_about_one_volume_are_one_entry() -> None:
    queue = WorkQueue()
    for _ in range(3):
        queue.add("a")
    queue.add("b")
    assert {queue.take(), queue.take()} == {"a", "b"}
    queue.close()
    assert queue.take() is None


def test_a_volume_in_work_is_not_given_out_but_comes_again() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert queue.take() == "a"
    queue.add("a")
    taken: list[str | None] = []
    taker = threading.Thread(target=lambda: taken.append(queue.take()))
    taker.start()
    taker.join(0.1)
    assert taken == []
    queue.done("a")
    taker.join(5)
    assert taken == ["a"]


def test_a_sooner_time_wins_over_a_later_one() -> None:
    queue = WorkQueue()
    queue.add("a", 3600)
    queue.add("a", 0)
    assert queue.take() == "a"
    queue.done("a")
    queue.add("b")
    assert queue.take() == "b"


def test_a_pass_that_fails_comes_again_and_others_go_on() -> None:
    queue, passes = WorkQueue(), []

    def run(name: str) -> float | None:
        passes.append(name)
        if name == "bad" and passes.count("bad") < 2:
            raise KeyError("a bug")
        return None

    workers = Workers(queue, run)
    workers.start()
    queue.add("bad")
    queue.add("good")
    until(lambda: sorted(passes) == ["bad", "bad", "good"], "the failed one again")
    workers.close()


# -- home ---------------------------------------------------------------------------------------


def test_a_home_has_one_service_and_the_second_learns_the_pid(tmp_path: Path) -> None:
    first, second = Home(tmp_path), Home(tmp_path)
    first.lock()
    with pytest.raises(ConflictError, match=rf"pid {os.getpid()}"):
        second.lock()
    first.unlock()
    second.lock()
    second.unlock()


def test_a_home_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be used"):
        Home(tmp_path / "file" / "home").prepare()


def test_a_short_token_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("short\n")
    with pytest.raises(StorageError, match="at least 16"):
        Home(tmp_path).token()


@pytest.mark.parametrize("address", ["", "9500", "localhost", "host:port", "1.2.3.4:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(RequestError, match="HOST:PORT"):
        tcp_socket(address)


def test_an_address_in_use_is_a_conflict() -> None:
    with tcp_socket("127.0.0.1:0") as taken, pytest.raises(ConflictError, match="cannot listen"):
        tcp_socket(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_home_with_a_long_path_works_through_short_socket_names(tmp_path: Path) -> None:
    harness = NodeHarness(tmp_path / ("long" * 20) / ("path" * 20))
    try:
        view = harness.create("d" * 63)
        sockets = harness.service.context.home.socket_directory(view.name, view.uid)
        assert harness.root not in sockets.parents
        assert stat.S_IMODE(sockets.parent.stat().st_mode) == 0o700
        assert harness.attach(view.name).state == "attached"
        harness.operations.remove(view.name, True, 30)
        assert not sockets.exists()
        sockets.parent.rmdir()
    finally:
        harness.close()


# -- control client -----------------------------------------------------------------------------


def _answering(path: Path, answer: bytes) -> threading.Thread:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(1)

    def serve() -> None:
        with listening, listening.accept()[0] as link:
            link.recv(4096)
            link.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (b'{"ok": false, "code": "conflict", "message": "taken"}\n', ConflictError, "taken"),
        (b"", PeerError, "broke off"),
        (b'{"ok": tr', PeerError, "broke off"),
        (b"[1]\n", PeerError, "broke off"),
    ],
)
def test_what_a_daemon_refuses_or_breaks_off_is_an_error(
    tmp_path: Path, answer: bytes, error: type[Exception], words: str
) -> None:
    thread = _answering(tmp_path / "s", answer)
    with pytest.raises(error, match=words):
        control.ask(tmp_path / "s", "status")
    thread.join()


def test_an_absent_daemon_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="no daemon answers"):
        control.status(tmp_path / "none")


# -- supervisor ---------------------------------------------------------------------------------

REPLICA_UUID = "11111111-2222-3333-4444-555555555555"


def _replica(directory: Path, *, create: bool = True) -> DaemonSpec:
    arguments = ["replica", str(directory / "replica"), "--listen", f"unix:{directory}/s"]
    arguments += ["--control", f"unix:{directory}/c", "--pid-file", f"{directory}/pid"]
    if create:
        arguments += ["--create", "--size", str(MIB), "--replica-uuid", REPLICA_UUID]
    return DaemonSpec(
        key="replica daemon",
        volume="data",
        arguments=tuple(arguments),
        control=directory / "c",
        log=directory / "log",
        pid_file=directory / "pid",
        identity=("replica_uuid", REPLICA_UUID),
    )


@pytest.fixture
def ends() -> list[str]:
    return []


@pytest.fixture
def supervisor(ends: list[str]) -> Iterator[Supervisor]:
    made = Supervisor(ends.append)
    yield made
    made.close()


def test_a_daemon_is_started_once_found_again_and_stopped(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = _replica(tmp_path)
    pid = supervisor.ensure(spec)["pid"]
    assert supervisor.ensure(spec)["pid"] == pid
    other = Supervisor(lambda volume: None)
    assert other.pid(spec) == pid
    other.stop(spec)
    assert other.pid(spec) is None
    until(lambda: supervisor.pid(spec) is None, "the first one has seen the end")
    other.close()


def test_a_daemon_that_does_not_answer_is_known_by_its_pid_file(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = _replica(tmp_path)
    pid = supervisor.ensure(spec)["pid"]
    os.kill(pid, signal.SIGSTOP)
    other = Supervisor(lambda volume: None)
    try:
        assert other._adopt(spec) is not None, "a second one must not be started"
    finally:
        os.kill(pid, signal.SIGCONT)
        other.close()
        supervisor.stop(spec)


def test_a_killed_daemon_wakes_its_volume_and_starts_again_at_once(
    supervisor: Supervisor, tmp_path: Path, ends: list[str]
) -> None:
    spec = _replica(tmp_path)
    pid = supervisor.ensure(spec)["pid"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: ends == ["data"], "the end is told")
    assert supervisor.ensure(spec)["pid"] != pid
    supervisor.stop(spec)


def test_a_daemon_that_fails_to_start_says_why_and_is_not_hammered(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = _replica(tmp_path, create=False)
    with pytest.raises(Exception, match="does not exist"):
        supervisor.ensure(spec)
    with pytest.raises(Exception, match="next try in"):
        supervisor.launch(spec)
    supervisor.forget(spec)
    supervisor.launch(spec)
    until(lambda: supervisor.pid(spec) is None, "it ends again")


def test_a_pid_file_of_another_process_is_not_believed(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    spec = _replica(tmp_path)
    spec.pid_file.write_text(str(os.getpid()))
    assert supervisor.pid(spec) is None


# -- the program --------------------------------------------------------------------------------


def test_the_program_leaves_volumes_running_when_killed_or_told_to_end(tmp_path: Path) -> None:
    harness = NodeHarness(tmp_path / "home")
    before = harness.create("data", replicas=2)
    view = harness.attach("data")
    harness.service.close()
    try:
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
            command = [sys.executable, "-m", "blockd", "--home", str(harness.root), "serve"]
            program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert program.stdout is not None
            assert "ready" in program.stdout.readline()
            with pytest.raises(ConflictError, match=f"pid {program.pid}"):
                NodeService(Home(harness.root))
            program.send_signal(number)
            said = program.communicate(timeout=30)[0]
            assert program.returncode == code
            assert ("go on serving" in said) == (code == 0)
    finally:
        harness.service = harness._started()
    until(lambda: harness.view("data").pid == view.pid, "the same volume daemon serves")
    pids = {replica.id: replica.pid for replica in before.replicas}
    assert {item.id: item.pid for item in harness.view("data").replicas} == pids
    harness.close()


def test_a_home_of_somebody_else_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path)
    home.prepare()

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may open everything
    with pytest.raises(StorageError, match="run this as the user who owns"):
        home.lock()
