"""Which volume daemon a device was made for, where a device does not outlive its daemon.

`frontend.json` in the volume's directory, written before the device is made: a crash in between
leaves a device that is taken for stale, never a stale one that is taken for good.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from blockd.frontends.base import Target


def note(target: Target, device: str | None = None) -> None:
    """The target's daemon is the one; `device`, if it is known already."""
    target.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = _path(target)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"daemon": target.daemon, "device": device}))
    temporary.rename(path)


def noted(target: Target) -> tuple[str | None, str | None]:
    """Daemon and device of the note; None where nothing is known."""
    try:
        content = json.loads(_path(target).read_text())
        return str(content["daemon"]), content.get("device")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def forget(target: Target) -> None:
    """There is no device any more."""
    with contextlib.suppress(FileNotFoundError):
        _path(target).unlink()


def _path(target: Target) -> Path:
    return target.directory / "frontend.json"
