"""Disk images in and out of volumes, with real daemons and qemu-img.

Proves that content and holes survive raw and qcow2 in both directions, that snapshots are exported
as they were, and that what fails leaves no volume and no file behind.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from blockd.cli import main
from blockd.frontends import tools
from tests.blockd.node_harness import NodeHarness, read

MIB = 1 << 20
REASON = tools.missing("qemu-img")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no disk images here: {REASON}")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    harness = NodeHarness(tmp_path / "home")
    harness.service.listen(None, None, demo=False)
    yield harness
    harness.close()


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_blockd(*words: str) -> tuple[int, str]:
        code = main(["--home", str(tmp_path / "home"), "volume", *words])
        return code, capsys.readouterr().err

    return run_blockd


def image(path: Path) -> bytes:
    """A sparse raw image of 24 MiB with two pieces of data; its content."""
    content = bytearray(24 * MIB)
    content[MIB : 2 * MIB] = Random(1).randbytes(MIB)
    content[-512:] = Random(2).randbytes(512)
    with open(path, "wb") as file:
        file.truncate(len(content))
        os.pwrite(file.fileno(), content[MIB : 2 * MIB], MIB)
        os.pwrite(file.fileno(), content[-512:], len(content) - 512)
    return bytes(content)


def test_a_raw_image_goes_in_and_comes_out_as_raw_and_qcow2(
    node: NodeHarness, run: Run, tmp_path: Path
) -> None:
    content = image(tmp_path / "in.img")
    words = ["import", "data", str(tmp_path / "in.img"), "--replicas", "2"]
    assert run(*words) == (0, "")
    view = node.view("data")
    assert (view.state, view.replica_count, view.size_bytes) == ("detached", 2, 24 * MIB)
    assert view.allocated_bytes < 8 * MIB
    assert run("export", "data", str(tmp_path / "out.img")) == (0, "")
    assert (tmp_path / "out.img").read_bytes() == content
    assert os.stat(tmp_path / "out.img").st_blocks * 512 < 4 * MIB
    assert node.view("data").state == "detached"
    assert run("export", "data", str(tmp_path / "q"), "--format", "qcow2") == (0, "")
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(tmp_path / "q")]
    subprocess.run([*command, str(tmp_path / "in.img")], check=True, capture_output=True)
    assert run("import", "again", str(tmp_path / "q"), "--size", "32M", "--replicas", "1")[0] == 0
    assert node.view("again").size_bytes == 32 * MIB
    found = read(node.attach("again"), tmp_path / "again")
    assert found == content + bytes(8 * MIB)


def test_a_snapshot_is_exported_as_it_was_while_the_volume_is_in_use(
    node: NodeHarness, run: Run, tmp_path: Path
) -> None:
    content = image(tmp_path / "in.img")
    assert run("import", "data", str(tmp_path / "in.img"), "--replicas", "1")[0] == 0
    node.attach("data")
    node.operations.snapshot_create("data", "then", {}, 30)
    (tmp_path / "zeros").write_bytes(bytes(24 * MIB))
    uri = node.view("data").nbd_uri
    assert uri
    subprocess.run(["nbdcopy", str(tmp_path / "zeros"), uri], check=True, timeout=30)
    assert run("export", "data@then", str(tmp_path / "then.img")) == (0, "")
    assert (tmp_path / "then.img").read_bytes() == content
    assert node.view("data").state == "attached"


def test_what_fails_leaves_nothing_behind(node: NodeHarness, run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken.qcow2"
    subprocess.run(["qemu-img", "create", "-f", "qcow2", str(broken), "24M"], check=True,
                   capture_output=True)  # fmt: skip
    with open(broken, "r+b", buffering=0) as file:
        (table,) = struct.unpack(">Q", os.pread(file.fileno(), 8, 40))
        os.pwrite(file.fileno(), struct.pack(">Q", 1 << 63 | 0x12200), table)  # not a whole cluster
    code, said = run("import", "data", str(broken), "--replicas", "1")
    assert code == 1
    assert "qemu-img" in said
    assert node.operations.volumes() == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("import", "new", "nothing.img"), 3),
        (("import", "Bad Name", "in.img"), 2),
        (("import", "new", "in.img", "--size", "1M"), 2),
        (("import", "there", "in.img"), 4),
        (("export", "none", "x.img"), 3),
        (("export", "there@none", "x.img"), 3),
        (("export", "there@", "x.img"), 2),
        (("export", "there", "in.img"), 4),
    ],
)
def test_bad_requests_change_nothing(
    node: NodeHarness, run: Run, tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    content = image(tmp_path / "in.img")
    node.create("there")
    placed = [str(tmp_path / word) if word.endswith(".img") else word for word in words]
    found, said = run(*placed)
    assert found == code, said
    assert [view.name for view in node.operations.volumes()] == ["there"]
    assert (tmp_path / "in.img").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "in.img"]


def test_the_first_import_of_a_foreign_file_says_what_it_is_not(
    node: NodeHarness, run: Run, tmp_path: Path
) -> None:
    code, said = run("import", "data", f"nbd+unix:///x?socket={tmp_path}/none.sock")
    assert code != 0
    assert "qemu-img" in said
    assert node.operations.volumes() == []
