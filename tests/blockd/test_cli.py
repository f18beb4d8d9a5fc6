"""The command line: what it prints, what it asks for, and which exit code it ends with.

Proves against a fake API that answers come out unchanged as JSON and YAML and uncut as tables, that
every error family has its exit code and its one line, and that commands send what was typed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import yaml

from blockd.cli import main
from blockd.cli.root import app
from protocol.errors import FAMILIES
from tests.blockd.cli_fake_node import FakeNode, serving_unix, volume_view

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("BLOCKD_HOME", "BLOCKD_URL", "BLOCKD_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def node(home: Path) -> Iterator[FakeNode]:
    with serving_unix(home / "blockd.sock") as fake:
        yield fake


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_blockd(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--home", str(home), *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_blockd


def leaf_commands(group: click.Group, path: str = "blockd") -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += leaf_commands(command, f"{path} {name}")
        else:
            found.append((f"{path} {name}", command))
    return found


def test_json_and_yaml_are_exactly_what_the_api_answered(node: FakeNode, run: Run) -> None:
    view = volume_view(message="größer")
    node.answer("GET", "/v1/volumes/data", view)
    code, printed, _ = run("volume", "show", "data", "-o", "json")
    assert (code, json.loads(printed)) == (0, view)
    assert "größer" in printed
    code, printed, _ = run("volume", "show", "data", "-o", "yaml")
    assert (code, yaml.safe_load(printed)) == (0, view)
    assert "größer" in printed


def test_a_table_in_a_pipe_is_neither_cut_off_nor_padded(node: FakeNode, run: Run) -> None:
    path = "/var/lib/" + "x" * 150
    replica = {**volume_view()["replicas"][0], "path": path}
    node.answer("GET", "/v1/volumes/data/replicas", [replica, volume_view()["replicas"][1]])
    code, printed, _ = run("replica", "ls", "data")
    assert code == 0
    heading, line, other = printed.splitlines()
    assert [heading, line, other] == [heading.rstrip(), line.rstrip(), other.rstrip()]
    assert heading.split() == ["ID", "STATE", "REBUILD", "PID", "ADDRESS", "PATH"]
    assert line.endswith(path)
    assert line.split()[:2] == [replica["id"], "IN_SYNC"]


def test_square_brackets_in_an_answer_are_text_and_not_markup(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes/data", volume_view(message="replica [red]x[/red] [1]"))
    _, printed, _ = run("volume", "show", "data")
    assert "replica [red]x[/red] [1]" in printed


def test_an_empty_list_says_what_to_do_and_is_still_json(node: FakeNode, run: Run) -> None:
    node.answer("GET", "/v1/volumes", [])
    assert "blockd volume create" in run("volume", "ls")[1]
    assert json.loads(run("volume", "ls", "-o", "json")[1]) == []


@pytest.mark.parametrize("code", sorted(FAMILIES))
def test_an_error_family_ends_with_its_exit_code_and_one_line(
    node: FakeNode, run: Run, code: str
) -> None:
    family = FAMILIES[code]
    node.fail("GET", "/v1/volumes/data", family.http_status, code, "volume data: no; try x")
    ended, printed, complaint = run("volume", "show", "data", "-o", "json")
    assert (ended, printed) == (family.exit_code, "")
    assert complaint == "blockd: volume data: no; try x\n"


def test_the_exit_codes_are_the_documented_ones() -> None:
    codes = {code: family.exit_code for code, family in FAMILIES.items()}
    named = {"bad_request": 2, "not_found": 3, "conflict": 4, "timeout": 5, "degraded": 6}
    named |= {"lost_writes": 7}
    assert codes == dict.fromkeys(FAMILIES, 1) | named


def test_no_node_service_is_one_line_with_its_address(run: Run, home: Path) -> None:
    code, _, complaint = run("volume", "ls")
    assert code == 1
    assert complaint == (
        f"blockd: node service is not running at {home}/blockd.sock; start it with `blockd serve`\n"
    )


@pytest.mark.parametrize("status", [200, 502])
def test_an_answer_that_is_not_json_is_one_line(node: FakeNode, run: Run, status: int) -> None:
    node.answer("GET", "/v1/volumes", b"<html>\nhello</html>", status=status)
    code, _, complaint = run("volume", "ls")
    assert code == 1
    assert complaint.startswith("blockd: ")
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("answer", [[], "text", 7])
def test_an_answer_of_the_wrong_shape_is_one_line(node: FakeNode, run: Run, answer: object) -> None:
    node.answer("GET", "/v1/volumes/data", answer)
    code, _, complaint = run("volume", "show", "data")
    assert code == 1
    assert complaint.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        ("volume", "missing command"),
        ("volume nonsense", "nonsense"),
        ("volume create data", "--size"),
        ("volume create data --size many", "many"),
        ("volume create data --size 1000000000000T", "8 TiB"),
        ("volume create data --size 1G --replicas 0", "--replicas"),
        ("volume create data --size 1G --block-size 1024", "1024"),
        ("volume create data --size 1G --label novalue", "novalue"),
        ("volume create Data! --size 1G", "Data!"),
        ("volume show ../status", "../status"),
        ("volume attach data --frontend floppy", "floppy"),
        ("volume show data -o xml", "xml"),
        ("snapshot create data", "VOL@NAME"),
        ("snapshot create data@", "data@"),
        ("snapshot create @monday", "@monday"),
        ("snapshot create data@a@b", "data@a@b"),
        ("volume ls surplus", "surplus"),
        ("volume detach data --timeout -1", "--timeout"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_never_reaches_the_service(
    node: FakeNode, run: Run, arguments: str, culprit: str
) -> None:
    code, printed, complaint = run(*arguments.split())
    assert (code, printed) == (2, "")
    assert complaint.startswith("blockd: ")
    assert culprit in complaint
    assert complaint.count("\n") == 1
    assert node.asked == []


def test_create_sends_what_was_typed(node: FakeNode, run: Run) -> None:
    node.answer("POST", "/v1/volumes", volume_view(), status=201)
    typed = "volume create data --size 1.5G --replicas 2 --block-size 512 --timeout 7"
    assert run(*typed.split())[0] == 0
    (asked,) = node.asked
    assert asked.body == {
        "name": "data",
        "size_bytes": 3 << 29,
        "replicas": 2,
        "block_size": 512,
    }
    assert asked.query == {"wait": "7"}


def test_a_relative_mount_point_is_taken_from_here(
    node: FakeNode, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    node.answer("POST", "/v1/volumes/data/mount", volume_view())
    assert run("volume", "mount", "data", "here/there", "--fs", "xfs")[0] == 0
    assert node.asked[0].body == {"path": f"{tmp_path}/here/there", "fs": "xfs"}
    code, _, complaint = run("--url", "http://127.0.0.1:1", "volume", "mount", "data", "here")
    assert code == 2
    assert "absolute" in complaint


def test_a_snapshot_is_named_by_volume_and_name(node: FakeNode, run: Run) -> None:
    snapshot = {"name": "monday", "created": "2026-01-05T10:00:00Z", "labels": {}, "id": 3}
    node.answer("POST", "/v1/volumes/data/snapshots", snapshot, status=201)
    node.answer("GET", "/v1/volumes/data/snapshots/monday", snapshot)
    node.answer("POST", "/v1/volumes/data/snapshots/monday/revert", volume_view())
    node.answer("DELETE", "/v1/volumes/data/snapshots/monday", b"", status=204)
    code, printed, _ = run("snapshot", "create", "data@monday", "--label", "by=ana=x")
    assert code == 0
    assert "data@monday" in printed
    assert node.asked[-1].body == {"name": "monday", "labels": {"by": "ana=x"}}
    assert "data@monday" in run("snapshot", "show", "data@monday")[1]
    assert run("snapshot", "revert", "data@monday", "--force-unmount")[0] == 0
    assert node.asked[-1].body == {"force": True}
    assert run("snapshot", "rm", "data@monday")[1] == "snapshot data@monday is removed\n"


def test_a_degraded_volume_warns_on_use_and_fails_only_a_check(node: FakeNode, run: Run) -> None:
    view = volume_view(health="degraded")
    node.answer("POST", "/v1/volumes/data/attach", view)
    node.answer("GET", "/v1/status", {"version": "0.1.0", "pid": 7, "volumes": 1})
    node.answer("GET", "/v1/volumes", [view])
    code, printed, complaint = run("volume", "attach", "data", "-o", "json")
    assert (code, json.loads(printed)) == (0, view)
    assert "warning: volume data is degraded" in complaint
    assert run("status")[0] == 0
    code, printed, complaint = run("status", "--check", "-o", "json")
    assert code == 6
    assert json.loads(printed)["volumes"] == [view]
    assert "data" in complaint


def test_every_command_shows_examples_and_prints_in_every_format() -> None:
    for path, command in leaf_commands(app):
        if path == "blockd daemon":
            continue  # it hands its help on to the daemons
        assert "Example" in (command.epilog or ""), path
        assert path in (command.epilog or ""), path
        names = {parameter.name for parameter in command.params}
        assert "output" in names or path == "blockd serve", path


def test_completion_offers_volumes_and_snapshots_and_survives_no_service(
    node: FakeNode, home: Path
) -> None:
    node.answer("GET", "/v1/volumes", [volume_view(), volume_view(name="other")])
    node.answer("GET", "/v1/volumes/data/snapshots", volume_view()["snapshots"])

    def complete(words: str, place: Path) -> list[str]:
        environment = {
            **os.environ,
            "BLOCKD_HOME": str(place),
            "_BLOCKD_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from blockd.__main__ import main; main()"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("blockd volume show d", home) == ["plain,data"]
    assert complete("blockd snapshot rm data@m", home) == ["plain,data@monday"]
    assert complete("blockd volume show d", home / "nothing") == []


@pytest.mark.parametrize(
    ("typed", "listen"),
    [("", None), ("--listen", "127.0.0.1:9500"), ("--listen=[::1]:80", "[::1]:80")],
)
def test_serve_hands_its_options_on_and_ends_with_the_services_code(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch, typed: str, listen: str | None
) -> None:
    given: list[dict[str, object]] = []

    def fake_serve(**options: object) -> int:
        given.append(options)
        return 1

    monkeypatch.setattr("blockd.node.service.serve", fake_serve)
    assert run("serve", *typed.split(), "--demo")[0] == 1
    assert run("serve", "--home", str(home / "other"))[0] == 1
    assert given == [
        {"home": home, "listen": listen, "token_file": None, "demo": True},
        {"home": home / "other", "listen": None, "token_file": None, "demo": False},
    ]
