"""Puts the files that make blockd a system service in place, and takes them away again.

They come from the folder `systemd/` next to this package, in a checkout as in an installation, and
get the program's path, the home and the address filled in. They go below PREFIX/lib (/usr/local),
not to /etc: that is for the machine's administrator, whose drop-ins stand above ours and survive.

A file is ours if its first line says so; any other is never replaced or removed.
"""

from __future__ import annotations

import os
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConflictError, NotFoundError, RequestError, StateError, StorageError

HOME = Path("/var/lib/blockd")
PREFIX = Path("/usr/local")
SOURCE = Path(__file__).resolve().parents[2] / "systemd"

_FOLDERS = {  # below PREFIX/lib
    "blockd.service": "systemd/system",
    "blockd-replica@.service": "systemd/system",
    "blockd-volume@.service": "systemd/system",
    "60-blockd.rules": "udev/rules.d",
}
_OURS = "# Installed by `blockd node install`"
# What needs no quoting in a unit and is no pattern in a udev rule.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/@:+,=-]*")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Change:
    """What was done with one file: installed, updated, unchanged, removed or absent."""

    path: str
    action: str


def own_program() -> Path:
    """The `blockd` program of this installation."""
    program = Path(sysconfig.get_path("scripts")) / "blockd"
    if not os.access(program, os.X_OK):
        raise NotFoundError(
            f"this installation has no program {program}; install it with pip, or name the "
            "program with --program"
        )
    return program


def install(
    *, root: Path, prefix: Path, program: Path, home: Path, listen: str | None
) -> list[Change]:
    """Make all files what they should be; nothing is written if one of them cannot be."""
    _check_root(root)
    values = {
        "PROGRAM": _plain("program", program),
        "HOME": _plain("home directory", home),
        "LISTEN": f" --listen {_address(listen)}" if listen is not None else "",
    }
    texts = {
        path: re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], _read(SOURCE / name))
        for name, path in _paths(root, prefix).items()
    }
    before = {path: _own_text(path) for path in texts}
    changes = []
    for path, text in texts.items():
        found = before[path]
        action = "installed" if found is None else "unchanged" if found == text else "updated"
        if found != text:
            _write(path, text)
        changes.append(Change(str(path), action))
    return changes


def uninstall(*, root: Path, prefix: Path) -> list[Change]:
    """Remove all files that are there; ConflictError while a unit is still enabled."""
    _check_root(root)
    wanted = sorted((root / "etc/systemd/system").glob("*.wants/blockd*.service"))
    enabled = [path.name for path in wanted if re.match(r"blockd(-\w+@.*)?\.service", path.name)]
    if enabled:
        raise ConflictError(
            f"still enabled: {', '.join(enabled)}; first: "
            f"systemctl disable --now {' '.join(enabled)}"
        )
    paths = list(_paths(root, prefix).values())
    there = {path for path in paths if _own_text(path) is not None}
    for path in there:
        try:
            path.unlink()
        except OSError as error:
            raise StorageError(f"{path} cannot be removed: {error.strerror}") from error
    return [Change(str(path), "removed" if path in there else "absent") for path in paths]


def _check_root(root: Path) -> None:
    if root.resolve() == Path("/") and os.geteuid() != 0:
        raise StateError("only root can change the services of this machine; try sudo, or --root")


def _paths(root: Path, prefix: Path) -> dict[str, Path]:
    below = root / _plain("prefix", prefix).lstrip("/") / "lib"
    return {name: below / folder / name for name, folder in _FOLDERS.items()}


def _plain(what: str, path: Path) -> str:
    """A path that means the same wherever it is written."""
    text = str(path)
    if not _PLAIN_PATH.fullmatch(text):
        raise RequestError(
            f"{what} {text!r} cannot stand in a unit file; use an absolute path of letters, "
            "digits and . _ - + @ : , ="
        )
    return text


def _address(listen: str) -> str:
    match = _ADDRESS.fullmatch(listen)
    if match is None or int(match[2]) >= 1 << 16:
        raise RequestError(f"address {listen!r} is not HOST:PORT; example: 127.0.0.1:9500")
    return listen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path} of this installation cannot be read: {error.strerror}; install blockd again"
        ) from error


def _own_text(path: Path) -> str | None:
    """What our file holds now, None if there is none."""
    if not path.exists():
        return None
    text = _read(path)
    if not text.startswith(_OURS):
        raise ConflictError(
            f"{path} was not made by `blockd node install`; move it away if it is not needed"
        )
    return text


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o644)
        temporary.rename(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
