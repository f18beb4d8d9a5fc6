"""Proves that running the system's programs is bounded: by their end, by time, and by the end of
the process that serves the device they use."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from blockd.frontends import processes, tools
from protocol.errors import StateError
from tests.blockd.node_harness import WAIT_SECONDS, until


def stuck(tmp_path: Path) -> tuple[list[str], Path]:
    """Arguments of a shell that writes its pid down and then stands still."""
    pid_file = tmp_path / "pid"
    return ["-c", 'echo $$ >"$0"; exec sleep 600', str(pid_file)], pid_file


def end(pid_file: Path) -> None:
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_for_end(pid, WAIT_SECONDS)


def test_output_and_exit_code_come_back() -> None:
    done = tools.attempt("sh", ["-c", "echo out; echo err >&2; exit 3"], server=os.getpid())
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    with pytest.raises(tools.ToolError, match="failed with code 3: words"):
        tools.run("sh", ["-c", "echo words >&2; exit 3"])


def test_a_program_whose_device_lost_its_server_is_left_alone(tmp_path: Path) -> None:
    arguments, pid_file = stuck(tmp_path)
    with subprocess.Popen(["sh", "-c", f"until [ -s {pid_file} ]; do sleep 0.05; done"]) as server:
        with pytest.raises(StateError, match=r"volume daemon ended.*sleep 600") as caught:
            tools.attempt("sh", arguments, server=server.pid)
        assert caught.value.retry
    os.kill(int(pid_file.read_text()), 0)  # it goes on when it can
    end(pid_file)


def test_a_server_that_is_gone_already_is_noticed(tmp_path: Path) -> None:
    arguments, pid_file = stuck(tmp_path)
    with subprocess.Popen(["true"]) as gone:
        pass
    with pytest.raises(StateError, match="volume daemon ended"):
        tools.attempt("sh", arguments, server=gone.pid)
    until(lambda: pid_file.exists() and pid_file.read_text(), "it has begun all the same")
    end(pid_file)


def test_a_program_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "TOOL_SECONDS", 1.0)
    arguments, pid_file = stuck(tmp_path)
    with pytest.raises(tools.ToolError, match="did not end within 1 s"):
        tools.attempt("sh", arguments)
    assert processes.wait_for_end(int(pid_file.read_text()), WAIT_SECONDS)
