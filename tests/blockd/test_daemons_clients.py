"""Proves that foreign NBD clients get right data, right extents and right errors from the daemons.

libnbd, qemu and fio share no code with blockd. What they compare is bytes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blockd.daemon_harness import Cluster, cluster
from tests.blockd.foreign import fio, libnbd, qemu_io, tool
from tests.blockd.nbd_client import FUA, NbdClient

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three replicas; one cluster for the file, every test writes what it reads."""
    with cluster(tmp_path_factory.mktemp("clients"), size="64M") as made:
        made.volume.must("snapshot-create", name="empty")
        yield made


@pytest.fixture
def blank(running: Cluster) -> Cluster:
    """The cluster with the whole volume trimmed."""
    client = NbdClient(running.nbd)
    client.trim(0, SIZE)
    client.close()
    return running


def image(path: Path, seed: int) -> Path:
    """A sparse file of the volume's size: random data, holes, odd ends."""
    source = random.Random(seed)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for _ in range(40):
            file.seek(source.randrange(SIZE - 300_000))
            file.write(source.randbytes(source.randrange(1, 300_000)))
    return path


def test_nbdinfo_names_size_exports_and_abilities(running: Cluster) -> None:
    uri = running.uri()
    export = json.loads(tool("nbdinfo", "--json", uri))["exports"][0]
    assert export["export-size"] == SIZE
    for ability in ("flush", "fua", "trim", "zero", "multi_conn", "fast_zero", "df", "cache"):
        assert export[f"can_{ability}"], ability
    assert not export["is_read_only"]
    assert "base:allocation" in export["contexts"]
    listed = json.loads(tool("nbdinfo", "--list", "--json", uri))["exports"]
    assert {one["export-name"]: one["is_read_only"] for one in listed} == {
        "vol": False,
        "vol@empty": True,
    }
    assert tool("nbdinfo", "--size", running.uri("empty")).strip() == str(SIZE)
    tool("nbdinfo", f"nbd+unix:///nosuch?socket={running.nbd}", expect=1)
    tool("nbdinfo", f"nbd+unix:///vol@nosuch?socket={running.nbd}", expect=1)


def extents(uri: str) -> list[tuple[int, int, int]]:
    found = json.loads(tool("nbdinfo", "--map", "--json", uri))
    return [(one["offset"], one["length"], one["type"]) for one in found]


def test_nbdinfo_map_shows_exactly_what_was_written_and_trimmed(blank: Cluster) -> None:
    assert extents(blank.uri()) == [(0, SIZE, 3)]
    client = NbdClient(blank.nbd)
    client.write(4 * MIB, os.urandom(MIB))
    client.write(20 * MIB + 8192, os.urandom(4096))
    client.trim(4 * MIB + 65536, 65536)
    client.close()
    assert extents(blank.uri()) == [
        (0, 4 * MIB, 3),
        (4 * MIB, 65536, 0),
        (4 * MIB + 65536, 65536, 3),
        (4 * MIB + 131072, MIB - 131072, 0),
        (5 * MIB, 15 * MIB + 8192, 3),
        (20 * MIB + 8192, 4096, 0),
        (20 * MIB + 12288, SIZE - 20 * MIB - 12288, 3),
    ]
    assert extents(blank.uri("empty")) == [(0, SIZE, 3)]


def test_nbdcopy_and_qemu_img_copy_both_ways_without_a_difference(
    blank: Cluster, tmp_path: Path
) -> None:
    source, back = image(tmp_path / "source", 1), tmp_path / "back"
    tool("nbdcopy", "--flush", str(source), blank.uri())
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), blank.uri())
    tool("nbdcopy", blank.uri(), str(back))
    assert back.read_bytes() == source.read_bytes()

    other, qcow = image(tmp_path / "other", 2), tmp_path / "copy.qcow2"
    tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(other), blank.uri())
    tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", blank.uri(), str(qcow))
    tool("qemu-img", "compare", str(qcow), str(other))
    tool("nbdcopy", "--connections=4", "--requests=16", blank.uri(), str(back))
    assert back.read_bytes() == other.read_bytes()
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", blank.uri(), str(source), expect=1)


def test_qemu_img_map_agrees_with_the_bytes(blank: Cluster, tmp_path: Path) -> None:
    source = image(tmp_path / "source", 3)
    tool("nbdcopy", str(source), blank.uri())
    content = source.read_bytes()
    found = json.loads(tool("qemu-img", "map", "--output=json", "-f", "raw", blank.uri()))
    assert sum(one["length"] for one in found) == SIZE
    assert any(one["data"] for one in found)
    assert any(one["zero"] for one in found)
    for one in found:
        if one["zero"]:
            assert not any(content[one["start"] : one["start"] + one["length"]]), one


def test_qemu_io_patterns_survive_discards_zeroes_and_odd_offsets(blank: Cluster) -> None:
    qemu_io(
        blank.uri(),
        "write -P 0x5a 0 1M",
        "read -P 0x5a 0 1M",
        "write -P 0x11 5 3",
        "read -P 0x5a 0 5",
        "read -P 0x11 5 3",
        "read -P 0x5a 8 4088",
        "write -P 0x22 1000 200000",
        "read -P 0x22 1000 200000",
        "read -P 0x5a 201000 512",
        "discard 64k 64k",
        "read -P 0 64k 64k",
        "read -P 0x22 128k 8k",
        "write -z 512k 64k",
        "read -P 0 512k 64k",
        "write -z -u 768k 64k",
        "read -P 0 768k 64k",
        "read -P 0x5a 832k 64k",
        "write -z 600001 77",
        "read -P 0 600001 77",
        "read -P 0x5a 600078 100",
        "write -f -P 0x33 16M 4k",
        "flush",
        "aio_write -P 0x44 20M 1M",
        "aio_write -P 0x55 22M 1M",
        "aio_flush",
        "read -P 0x44 20M 1M",
        "read -P 0x55 22M 1M",
    )
    qemu_io(blank.uri(), "read -P 0x33 16M 4k", "read -P 0x5a 300k 64k")


LIBNBD_DATA = """
import nbd, sys
uri = sys.argv[1]
h = nbd.NBD(); h.add_meta_context("base:allocation"); h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.can_meta_context("base:allocation")
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MINIMUM) <= 512
h.pwrite(b"a" * 8192, 4096, nbd.CMD_FLAG_FUA)
h.pwrite(b"z" * 512, 4096 + 512)
assert h.pread(8192, 4096) == b"a" * 512 + b"z" * 512 + b"a" * 7168
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
mixed = b"a" * 512 + b"z" * 512 + b"a" * 3072
assert h.pread(16384, 0) == bytes(4096) + mixed + bytes(8192)
h.zero(1024, 4096, nbd.CMD_FLAG_NO_HOLE)
assert h.pread(16384, 0) == bytes(4096) + bytes(1024) + b"a" * 3072 + bytes(8192)
h.pwrite(b"b" * 65536, 1 << 20)
h.zero(4096, (1 << 20) + 4096)
chunks = []
h.pread_structured(65536, 1 << 20, lambda data, offset, status, error: chunks.append(
    (offset - (1 << 20), len(data), status)))
assert [c for c in sorted(chunks) if c[2] == nbd.READ_HOLE] == [(4096, 4096, nbd.READ_HOLE)]
chunks.clear()
data = h.pread_structured(65536, 1 << 20, lambda data, offset, status, error: chunks.append(
    (offset, len(data), status)), nbd.CMD_FLAG_DF)
assert chunks == [(1 << 20, 65536, nbd.READ_DATA)], chunks
assert data == b"b" * 4096 + bytes(4096) + b"b" * 57344
got = []
status = lambda context, offset, entries, error: got.extend(entries)
h.block_status(65536, 1 << 20, status)
assert got[:5] == [4096, 0, 4096, 3, 57344], got
got.clear()
h.block_status(65536, 1 << 20, status, nbd.CMD_FLAG_REQ_ONE)
assert got == [4096, 0], got
h.cache(65536, 1 << 20)
h.flush()
try:
    h.zero(1 << 20, 0, nbd.CMD_FLAG_FAST_ZERO)
except nbd.Error as error:
    assert error.errno == "ENOTSUP", error
h.shutdown()
s = nbd.NBD(); s.set_request_structured_replies(False); s.connect_uri(uri)
assert not s.get_structured_replies_negotiated()
assert s.pread(8192, 1 << 20) == b"b" * 4096 + bytes(4096)
s.shutdown()
o = nbd.NBD(); o.set_export_name("vol"); o.set_handshake_flags(0); o.connect_uri(uri)
assert o.get_protocol() == "newstyle" and o.pread(4096, (1 << 20) + 8192) == b"b" * 4096
o.shutdown()
"""


def test_libnbd_gets_fua_df_holes_extents_and_simple_replies_right(blank: Cluster) -> None:
    libnbd(LIBNBD_DATA, blank.uri())


LIBNBD_ILLEGAL = """
import nbd, sys
uri, snapshot = sys.argv[1:]
def refused(errno, call, *arguments):
    try:
        call(*arguments)
    except nbd.Error as error:
        assert error.errno in errno.split(), (call, arguments[1:], error)
    else:
        raise AssertionError(f"{call} {arguments[1:]} was accepted")
h = nbd.NBD(); h.connect_uri(uri); h.set_strict_mode(0)
size = h.get_size()
h.pwrite(b"k" * 4096, size - 4096)
refused("ENOSPC", h.pwrite, b"x" * 4096, size)
refused("ENOSPC", h.pwrite, b"x" * 4096, size - 2048)
refused("ENOSPC", h.zero, 4096, size - 2048)
refused("EINVAL", h.pread, 4096, size)
refused("EINVAL", h.pread, 4096, size - 1)
refused("EINVAL", h.pread, 4096, (1 << 63) - 4096)
refused("EINVAL", h.trim, 4096, size - 2048)
refused("EINVAL", h.cache, 4096, size - 2048)
refused("EINVAL", h.block_status, 4096, 0, lambda *a: 0)
refused("EINVAL", h.pread, 512, 0, nbd.CMD_FLAG_FAST_ZERO)
refused("EINVAL", h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_NO_HOLE)
refused("EINVAL", h.trim, 512, 0, nbd.CMD_FLAG_DF)
refused("EINVAL", h.flush, 1 << 9)
assert h.pread(4096, size - 4096) == b"k" * 4096, "a refused write left something"
big = 40 << 20
try:
    h.pwrite(b"B" * big, 0)
except nbd.Error as error:
    assert error.errno == "EINVAL", error
else:
    assert h.pread(4096, big - 4096) == b"B" * 4096
try:
    assert len(h.pread(big, 0)) == big
except nbd.Error as error:
    assert error.errno in ("EOVERFLOW", "EINVAL"), error
for call in ((h.pread, 0, 0), (h.trim, 0, 0), (h.zero, 0, 0), (h.pwrite, b"", 0)):
    try:
        call[0](*call[1:])
    except nbd.Error as error:
        assert error.errno == "EINVAL", error
h.zero(size, 0)
assert h.pread(4096, size - 4096) == bytes(4096), "a long zero was cut short"
h.pwrite(b"x" * (1 << 20), size - (1 << 20))
h.trim(size, 0)
assert not any(h.pread(1 << 20, size - (1 << 20))), "a long trim was cut short"
h.shutdown()
n = nbd.NBD(); n.set_request_structured_replies(False); n.connect_uri(uri); n.set_strict_mode(0)
refused("EINVAL", n.pread, 512, 0, nbd.CMD_FLAG_DF)
assert n.pread(512, 0) == bytes(512)
n.shutdown()
r = nbd.NBD(); r.connect_uri(snapshot); r.set_strict_mode(0)
assert r.is_read_only()
refused("EPERM", r.pwrite, b"x" * 512, 0)
refused("EPERM", r.trim, 4096, 0)
refused("EPERM", r.zero, 4096, 0)
assert r.pread(4096, 0) == bytes(4096)
r.flush()
r.shutdown()
"""


def test_illegal_requests_are_refused_and_the_connection_goes_on(blank: Cluster) -> None:
    libnbd(LIBNBD_ILLEGAL, blank.uri(), blank.uri("empty"))


def test_an_unknown_command_is_refused_and_the_connection_goes_on(blank: Cluster) -> None:
    client = NbdClient(blank.nbd)
    with pytest.raises(OSError, match="failed") as refused:
        client.run(99, 0, 4096)
    assert refused.value.errno == 22
    client.write(0, b"y" * 512, FUA)
    assert client.read(0, 512) == b"y" * 512
    client.close()


def test_a_flush_on_one_connection_covers_writes_of_another(blank: Cluster) -> None:
    writer, flusher = NbdClient(blank.nbd), NbdClient(blank.nbd)
    for round_number in range(20):
        data = bytes([round_number + 1]) * 4096
        writer.write(round_number * 4096, data)
        flusher.flush()
        assert flusher.read(round_number * 4096, 4096) == data
    writer.close()
    flusher.close()


@pytest.mark.parametrize(
    "options",
    [
        ("--rw=randrw", "--bsrange=4k-256k", "--iodepth=16", "--size=48M"),
        ("--rw=randwrite", "--bsrange=512-16k", "--bs_unaligned", "--iodepth=32", "--size=8M"),
        ("--rw=randwrite", "--bs=512", "--iodepth=16", "--offset=512", "--size=2M"),
        ("--rw=write", "--bs=1M", "--iodepth=8", "--size=64M", "--fsync=4"),
    ],
    ids=["mixed", "unaligned", "sectors", "sequential"],
)
def test_fio_verifies_every_block_it_wrote(blank: Cluster, options: tuple[str, ...]) -> None:
    tool(*fio(blank.uri(), *options))
