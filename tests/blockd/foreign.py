"""NBD clients of other projects, run as commands: they share no code and no belief with blockd."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "fio": "fio",
}
COMMAND_SECONDS_MAX = 60


def tool(*command: str, expect: int = 0) -> str:
    """Run a foreign tool; its output. A missing one skips the test and names its package."""
    name = command[0]
    if shutil.which(name) is None:
        pytest.skip(f"{name} is missing (Debian package {PACKAGES.get(name, name)})")
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX)
    said = done.stdout + done.stderr
    assert done.returncode == expect, f"{' '.join(command)} ended with {done.returncode}: {said}"
    return done.stdout


PYTHON = "/usr/bin/python3"  # libnbd's module belongs to it


def _need_libnbd() -> None:
    if (
        not Path(PYTHON).exists()
        or subprocess.run([PYTHON, "-c", "import nbd"], capture_output=True).returncode
    ):
        pytest.skip("libnbd's Python module is missing (Debian package python3-libnbd)")


@contextmanager
def libnbd_process(script: str) -> Iterator[subprocess.Popen[str]]:
    """A script with libnbd's Python module that talks to the test; it must end well."""
    _need_libnbd()
    pipe = subprocess.PIPE
    with subprocess.Popen([PYTHON, "-c", script], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
            assert process.wait(COMMAND_SECONDS_MAX) == 0
        finally:
            process.kill()


def libnbd(script: str, *arguments: str) -> str:
    """Run a script with libnbd's Python module."""
    _need_libnbd()
    done = subprocess.run(
        [PYTHON, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS_MAX,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_io(uri: str, *commands: str, read_only: bool = False) -> str:
    """Run qemu-io commands on one connection; every pattern must verify."""
    words = [word for command in commands for word in ("-c", command)]
    mode = ["-r"] if read_only else ["-d", "unmap"]
    said = tool("qemu-io", "-f", "raw", *mode, *words, uri)
    assert "failed" not in said, said
    return said


def fio(uri: str, *options: str) -> list[str]:
    """The command line of one verifying fio job."""
    return [
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={uri}",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--group_reporting=1",
        *options,
    ]
