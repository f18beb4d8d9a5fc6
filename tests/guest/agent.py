"""Runs in the guest: does what the host asks for on a virtio-serial port.

One JSON object per line and direction. The first line out says that the guest is up. Then each
request has an `id` that its answer repeats, and one of

    run: argument list, input: base64, seconds: limit   ->  code (null: over the limit), out, err
    put: path, data: base64, mode: bits                 ->  nothing more
    get: path                                           ->  data: base64

or the answer is `error`, in words. Requests are done at the same time, each in its thread. Nothing
of the project is imported here.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

PORTS = Path("/sys/class/virtio-ports")
_sending = threading.Lock()


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
    if "run" in request:
        return _run(request["run"], base64.b64decode(request["input"]), request["seconds"])
    if "put" in request:
        path = Path(request["put"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(request["data"]))
        path.chmod(request["mode"])
        return {}
    return {"data": base64.b64encode(Path(request["get"]).read_bytes()).decode()}


def _run(words: list[str], content: bytes, limit_seconds: float) -> dict[str, Any]:
    """Output goes to files: what the command leaves running may keep them open."""
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(content)
        given.seek(0)
        process = subprocess.Popen(
            words, stdin=given, stdout=out, stderr=err, start_new_session=True
        )
        code: int | None
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = None  # not waited for: it may hang in the kernel
        out.seek(0)
        err.seek(0)
        return {
            "code": code,
            "out": base64.b64encode(out.read()).decode(),
            "err": base64.b64encode(err.read()).decode(),
        }


def _send(port: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    with _sending:
        while data:
            data = data[os.write(port, data) :]


if __name__ == "__main__":
    serve()
