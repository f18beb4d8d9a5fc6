"""Runs in the guest: does what the host asks for on a virtio-serial port.

One JSON object per line and direction. The first line out says that the guest is up. Then each
request has an `id` that its answer repeats, and one of

    run: argument list, input: base64, seconds: limit   ->  code (null: over the limit), out, err
    blockd: arguments, input, seconds                   ->  the same
    put: path, data: base64, mode: bits                 ->  nothing more
    get: path                                           ->  data: base64

or the answer is `error`, in words. Requests are done at the same time, each in its thread.

`blockd` is the command line, forked from this process, which imports it once: the machine is
emulated, and importing takes seconds there.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PORTS = Path("/sys/class/virtio-ports")
SOURCE = Path("/src")
POLL_SECONDS = 0.01
Start = Callable[[list[str], int, int, int], int]  # words, stdin, stdout, stderr -> pid

_sending = threading.Lock()
_importing = threading.Lock()


def serve() -> None:
    """Answer until the host closes the port."""
    port = os.open(f"/dev/{next(PORTS.iterdir()).name}", os.O_RDWR | os.O_CLOEXEC)
    _send(port, {"id": 0, "up_seconds": float(Path("/proc/uptime").read_text().split()[0])})
    with open(port, "rb", closefd=False) as lines:
        for line in lines:
            threading.Thread(target=_answer, args=(port, json.loads(line)), daemon=True).start()


def _answer(port: int, request: dict[str, Any]) -> None:
    try:
        answer = _done(request)
    except (OSError, ValueError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    _send(port, {"id": request["id"], **answer})


def _done(request: dict[str, Any]) -> dict[str, Any]:
    if "run" in request or "blockd" in request:
        start = _started if "run" in request else _forked
        words = request["run"] if "run" in request else request["blockd"]
        return _run(start, words, base64.b64decode(request["input"]), request["seconds"])
    if "put" in request:
        path = Path(request["put"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(request["data"]))
        path.chmod(request["mode"])
        return {}
    return {"data": base64.b64encode(Path(request["get"]).read_bytes()).decode()}


def _run(start: Start, words: list[str], content: bytes, limit_seconds: float) -> dict[str, Any]:
    """Output goes to files: what the command leaves running may keep them open."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(content)
        given.seek(0)
        pid = start(words, given.fileno(), out.fileno(), err.fileno())
        deadline = time.monotonic() + limit_seconds
        code: int | None = None
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)  # not waited for: it may hang in the kernel
                break
            time.sleep(POLL_SECONDS)
        out.seek(0)
        err.seek(0)
        return {
            "code": code,
            "out": base64.b64encode(out.read()).decode(),
            "err": base64.b64encode(err.read()).decode(),
        }


def _started(words: list[str], given: int, out: int, err: int) -> int:
    actions = [
        (os.POSIX_SPAWN_DUP2, source, target) for target, source in enumerate((given, out, err))
    ]
    return os.posix_spawnp(
        words[0],
        words,
        os.environ,
        file_actions=actions,
        setsid=True,
        setsigdef=[signal.SIGPIPE],  # Python ignores it
    )


def _forked(words: list[str], given: int, out: int, err: int) -> int:
    with _importing:
        for module in pkgutil.iter_modules([str(SOURCE / "blockd" / "cli")], "blockd.cli."):
            importlib.import_module(module.name)
    main = importlib.import_module("blockd.cli").main
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            for target, source in enumerate((given, out, err)):
                os.dup2(source, target)
            code = main(words)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _send(port: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    with _sending:
        while data:
            data = data[os.write(port, data) :]


if __name__ == "__main__":
    serve()
