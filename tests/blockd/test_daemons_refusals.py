"""Proves that a daemon that must not start says why in one line, exits as the table says, and
leaves everything as it was.

Exit codes: 1 failed, 2 the caller's words, 3 not there, 4 in use or owned by somebody else.
"""

from __future__ import annotations

import hashlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Daemon

BLOCK = 4096


def fingerprint(directory: Path) -> dict[str, str]:
    """Every file below a directory and what is in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.is_socket()
    }


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[list[Daemon]]:
    """Daemons that a test starts by itself; those still alive are killed."""
    started: list[Daemon] = []
    yield started
    for daemon in started:
        if daemon.alive():
            daemon.kill()


def replica(directory: Path, *options: str, name: str = "r", path: str = "r") -> Daemon:
    listen = ["--listen", f"unix:{directory}/{name}.sock"]
    words = ["replica", str(directory / path), *(() if "--listen" in options else listen)]
    return Daemon(name, [*words, *options], directory)


def created(directory: Path, path: str = "r", size: str = "16M", *options: str) -> Path:
    """A replica directory made by the daemon and closed cleanly."""
    daemon = replica(directory, "--create", "--size", size, *options, path=path).start()
    assert daemon.end() == 0
    return directory / path


def volume(directory: Path, *options: str, name: str = "v", replicas: tuple[str, ...]) -> Daemon:
    words = ["volume", "vol"] if "--as" not in options else ["volume", options[1]]
    rest = options if "--as" not in options else options[2:]
    words += [word for address in replicas for word in ("--replica", address)]
    words += [] if "--nbd" in rest else ["--nbd", f"unix:{directory}/{name}.nbd"]
    words += [] if "--state" in rest else ["--state", str(directory / "state.db")]
    return Daemon(name, [*words, *rest], directory)


# ---- words --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "-1", "1000001", "4097K", "9T", "ten", "1G1", "1023K", ""])
def test_an_impossible_size_is_refused(tmp_path: Path, size: str) -> None:
    done = subprocess.run(
        [*replica(tmp_path).command(), "--create", f"--size={size}"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--listen", "nowhere"),
        ("--listen", "tcp:127.0.0.1:99999"),
        ("--listen", "tcp:127.0.0.1:x"),
        ("--listen", "unix:"),
        ("--listen", "unix:/tmp/" + "x" * 120),
        ("--create",),
        ("--control", "tcp:127.0.0.1:1"),
    ],
    ids=lambda options: " ".join(options)[:40],
)
def test_impossible_replica_options_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    existing = options[0] != "--create"
    if existing:
        created(tmp_path)
    code, said = replica(tmp_path, *options).refused()
    assert code == 2, said
    assert (tmp_path / "r").exists() == existing


@pytest.mark.parametrize("name", ["", "Vol", "a/b", "../x", "a@b", "a" * 64, "-a", "vol "])
def test_an_impossible_volume_name_is_refused(tmp_path: Path, name: str) -> None:
    daemon = Daemon("v", ["volume", "--replica=unix:/x", "--nbd=unix:/y", "--", name], tmp_path)
    done = subprocess.run(daemon.command(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


# ---- directories ----------------------------------------------------------------------------


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    code, said = replica(tmp_path).refused()
    assert code == 3, said
    assert str(tmp_path / "r") in said
    assert not (tmp_path / "r").exists()


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "r"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    before = fingerprint(foreign)
    for options in ((), ("--create", "--size", "16M")):
        code, said = replica(tmp_path, *options).refused()
        assert code in (1, 2, 4), said
        assert str(foreign) in said
        assert fingerprint(foreign) == before
    (tmp_path / "file").write_text("a file")
    code, said = replica(tmp_path, "--create", "--size", "16M", path="file").refused()
    assert code in (1, 2, 4), said
    assert (tmp_path / "file").read_text() == "a file"


def damage_flip(text: bytes) -> bytes:
    return text.replace(b'"size_bytes": 16777216', b'"size_bytes": 16777217').replace(
        b'"size_bytes":16777216', b'"size_bytes":16777217'
    )


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        lambda text: text[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff" * len(text),
        lambda text: b"[]",
        lambda text: b'{"format": 999999}',
        lambda text: text + b"x",
    ],
    ids=["flipped", "half", "empty", "binary", "list", "future", "longer"],
)
def test_a_corrupt_replica_json_is_refused_and_nothing_is_lost(
    tmp_path: Path, damage: object
) -> None:
    made = created(tmp_path)
    good = (made / "replica.json").read_bytes()
    bad = damage(good)  # type: ignore[operator]
    assert bad != good
    (made / "replica.json").write_bytes(bad)
    before = fingerprint(made)
    for options in ((), ("--create", "--size", "16M")):
        code, said = replica(tmp_path, *options).refused()
        assert code == 1, said
        assert "replica.json" in said
        assert fingerprint(made) == before
    (made / "replica.json").write_bytes(good)
    daemon = replica(tmp_path).start()
    assert daemon.end() == 0


def test_a_missing_layer_file_is_refused(tmp_path: Path) -> None:
    made = created(tmp_path)
    files = list((made / "layers").iterdir())
    assert files
    for file in files:
        file.unlink()
    code, said = replica(tmp_path).refused()
    assert code == 1, said


def test_an_existing_replica_of_another_kind_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    one, other = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
    made = created(tmp_path, "r", "16M", "--replica-uuid", one, "--volume-uuid", one)
    before = fingerprint(made)
    same = replica(tmp_path, "--create", "--size", "16M", "--replica-uuid", one).start()
    assert same.end() == 0
    for options in (
        ("--size", "16M", "--replica-uuid", other),
        ("--size", "16M", "--replica-uuid", one, "--volume-uuid", other),
        ("--size", "32M", "--replica-uuid", one),
    ):
        code, said = replica(tmp_path, "--create", *options).refused()
        assert code == 4, said
    assert fingerprint(made).keys() == before.keys()


def test_a_directory_has_one_owner(tmp_path: Path, daemons: list[Daemon]) -> None:
    created(tmp_path)
    first = replica(tmp_path).start()
    daemons.append(first)
    code, said = replica(tmp_path, name="second").refused()
    assert code == 4, said
    assert str(tmp_path / "r") in said
    code, said = volume(tmp_path, replicas=(f"dir:{tmp_path}/r",)).refused()
    assert code in (1, 4), said
    assert first.must("status")["failed"] is None
    first.kill()
    again = replica(tmp_path).start()  # a killed owner leaves no lock behind
    daemons.append(again)


# ---- addresses and files ----------------------------------------------------------------------


def test_an_address_in_use_stays_with_its_user(tmp_path: Path, daemons: list[Daemon]) -> None:
    created(tmp_path, "a")
    created(tmp_path, "b")
    first = replica(tmp_path, name="x", path="a").start()
    daemons.append(first)
    second = replica(tmp_path, "--listen", f"unix:{tmp_path}/x.sock", name="y", path="b")
    code, said = second.refused()
    assert code == 4, said
    assert f"{tmp_path}/x.sock" in said
    daemons.append(volume(tmp_path, replicas=(f"unix:{tmp_path}/x.sock",)).start())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = replica(tmp_path, "--listen", f"127.0.0.1:{port}", path="b").refused()
        assert code == 4, said
        other = volume(
            tmp_path,
            "--nbd",
            f"tcp:127.0.0.1:{port}",
            "--state",
            str(tmp_path / "other.db"),
            name="w",
            replicas=(f"dir:{tmp_path}/b",),
        )
        code, said = other.refused()
        assert code == 4, said
    (tmp_path / "plain").write_text("no socket")
    code, said = replica(tmp_path, "--listen", f"unix:{tmp_path}/plain", path="b").refused()
    assert code == 4, said
    assert (tmp_path / "plain").read_text() == "no socket"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A volume with a record, and a letter; after all refusals both are as they were."""
    directory = tmp_path_factory.mktemp("kept")
    created(directory, "r", "16M")
    (directory / "text").write_text("this is no database, it is a letter\n" * 50)
    made = volume(directory, replicas=(f"dir:{directory}/r",)).start()
    assert made.end() == 0
    yield directory
    assert (directory / "text").read_text().startswith("this is no database")
    made.start()
    assert made.must("status")["health"] == "healthy"
    assert made.end() == 0


@pytest.mark.parametrize(
    ("options", "codes"),
    [
        (("--state", "{dir}/nosuch/state.db"), (1, 3)),
        (("--state", "{dir}"), (1,)),
        (("--state", "{dir}/text"), (1,)),
        (("--state", "/proc/state.db"), (1,)),
        (("--control", "unix:{dir}/nosuch/v.ctl"), (1, 2, 3, 4)),
        (("--pid-file", "{dir}/nosuch/v.pid"), (1, 2, 3)),
        (("--key-file", "{dir}/nosuch"), (1, 2, 3)),
        (("--key-file", "{dir}"), (1, 2, 3)),
        (("--nbd", "unix:{dir}/nosuch/v.nbd"), (1, 2, 3, 4)),
        (("--volume-uuid", "x"), (2,)),
        (("--volume-uuid", "33333333-3333-4333-8333-333333333333"), (1, 3, 4)),
        (("--as", "other"), (1, 2, 4)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_an_unusable_file_or_identity_is_one_clear_line(
    kept: Path, options: tuple[str, ...], codes: tuple[int, ...]
) -> None:
    words = [word.format(dir=kept) for word in options]
    daemon = volume(kept, *words, replicas=(f"dir:{kept}/r",))
    code, said = daemon.refused()
    assert code in codes, said
