"""`blockd daemon spare`: a process that has everything loaded and waits to become a daemon.

Starting Python and loading a daemon's modules takes longer than opening a volume. While a kernel
device waits for the next volume daemon that is time in which all its I/O stands still, so the node
service keeps one spare process. It reads one line of JSON from standard input:

    {"arguments": ["volume", "data", ...], "log": "/path"}

and is that daemon from then on, under its command line and with its output in that log. The end of
standard input in place of a line (the node service is gone) ends it. The blanks that its command
line ends with are the room for the daemon's.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

_ARG_START, _ARG_END = 47, 48  # fields of /proc/self/stat, counted from 0


def main(run: Callable[[list[str]], int]) -> int:
    """Wait for the line, then `run` its arguments; the exit code."""
    import blockd.daemons.volume_main  # noqa: F401 - loaded now, used when the line has come

    line = sys.stdin.readline()
    if not line:
        return 0
    order = json.loads(line)
    arguments = [str(argument) for argument in order["arguments"]]
    _become(arguments, str(order["log"]))
    return run(arguments)


def _become(arguments: list[str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(null, 0)
    _show([*sys.orig_argv[: sys.orig_argv.index("spare")], *arguments])


def _show(words: list[str]) -> None:
    """Make /proc/PID/cmdline say what this process is; it is known again by that."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()  # from field 2 on
    start, end = int(fields[_ARG_START - 2]), int(fields[_ARG_END - 2])
    text = b"\0".join(os.fsencode(word) for word in words)
    if len(text) < end - start:
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(text.ljust(end - start, b"\0"))
