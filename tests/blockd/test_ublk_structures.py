"""Proves that structures and numbers of ublk are those of the kernel's header, by a C compiler."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.frontends.ublk import UblkFrontEnd
from blockd.kernel import io_uring, ublk

HEADER = Path("/usr/include/linux/ublk_cmd.h")
PROGRAM = r"""
#include <linux/ublk_cmd.h>
#include <linux/io_uring.h>
#include <linux/ioctl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#define SAY(name, value) printf("%s %llu\n", name, (unsigned long long)(value))
static void bytes(const char *name, const void *at, size_t n)
{
    printf("%s ", name);
    for (size_t i = 0; i < n; i++) printf("%02x", ((const unsigned char *)at)[i]);
    printf("\n");
}
int main(void)
{
    struct ublksrv_ctrl_dev_info info;
    struct ublk_params params;
    struct ublksrv_io_cmd io = {.q_id = 1, .tag = 2, .result = -3, .addr = 4};
    memset(&info, 0, sizeof info);
    memset(&params, 0, sizeof params);
    info.nr_hw_queues = 2; info.queue_depth = 128; info.max_io_buf_bytes = 524288;
    info.dev_id = 7; info.flags = 0x58; info.ublksrv_flags = 0x1122334455667788ULL;
    bytes("info", &info, sizeof info);
    params.len = offsetof(struct ublk_params, discard) + sizeof params.discard;
    params.types = UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD;
    params.basic.attrs = UBLK_ATTR_VOLATILE_CACHE | UBLK_ATTR_FUA;
    params.basic.logical_bs_shift = 9; params.basic.physical_bs_shift = 12;
    params.basic.io_opt_shift = 12; params.basic.io_min_shift = 12;
    params.basic.max_sectors = 1024; params.basic.dev_sectors = 2048;
    params.discard.discard_granularity = 4096;
    params.discard.max_discard_sectors = 2097152;
    params.discard.max_write_zeroes_sectors = 2097152;
    params.discard.max_discard_segments = 1;
    bytes("params", &params, params.len);
    bytes("io", &io, sizeof io);
    SAY("desc", sizeof(struct ublksrv_io_desc));
    SAY("fetch", _IOWR('u', UBLK_IO_FETCH_REQ, struct ublksrv_io_cmd));
    SAY("commit", _IOWR('u', UBLK_IO_COMMIT_AND_FETCH_REQ, struct ublksrv_io_cmd));
    SAY("start", _IOWR('u', UBLK_CMD_START_DEV, struct ublksrv_ctrl_cmd));
    SAY("get", _IOR('u', UBLK_CMD_GET_DEV_INFO, struct ublksrv_ctrl_cmd));
    SAY("recover", _IOWR('u', UBLK_CMD_START_USER_RECOVERY, struct ublksrv_ctrl_cmd));
    SAY("command_at", offsetof(struct io_uring_sqe, cmd));
    SAY("uring_cmd", IORING_OP_URING_CMD);
    SAY("params_bytes", sizeof(struct io_uring_params));
    SAY("depth_max", UBLK_MAX_QUEUE_DEPTH);
    SAY("write_zeroes", UBLK_IO_OP_WRITE_ZEROES);
    SAY("fua", UBLK_IO_F_FUA);
    SAY("nounmap", UBLK_IO_F_NOUNMAP);
    SAY("recovery", UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE);
    SAY("quiesced", UBLK_S_DEV_QUIESCED);
    return 0;
}
"""


@pytest.mark.skipif(
    not HEADER.exists() or shutil.which("gcc") is None,
    reason="needs gcc and the kernel's headers (linux-libc-dev)",
)
def test_structures_and_numbers_are_those_of_the_header(tmp_path: Path) -> None:
    source, program = tmp_path / "said.c", tmp_path / "said"
    source.write_text(PROGRAM)
    subprocess.run(["gcc", "-o", program, source], check=True)
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    said = dict(line.split() for line in output.splitlines())
    flags = ublk.USER_RECOVERY | ublk.USER_RECOVERY_REISSUE | ublk.CMD_IOCTL_ENCODE
    wanted = ublk.Info(7, 0, 0, flags, 0x1122334455667788, 2, 128, 524288)
    assert ublk.pack_info(wanted).hex() == said["info"]
    assert ublk.unpack_info(bytearray.fromhex(said["info"])) == wanted
    parameters = ublk.Parameters(1 << 20, 512, read_only=False)
    assert ublk.pack_parameters(parameters, 524288).hex() == said["params"]
    assert ublk.IO_COMMAND.pack(1, 2, -3, 4).hex() == said["io"]
    numbers = {
        "desc": ublk.IO_DESCRIPTOR_BYTES,
        "fetch": ublk.FETCH,
        "commit": ublk.COMMIT_AND_FETCH,
        "start": ublk._START,
        "get": ublk._GET_INFO,
        "recover": ublk._START_RECOVERY,
        "command_at": io_uring.COMMAND_AT,
        "uring_cmd": io_uring.URING_CMD,
        "params_bytes": io_uring._PARAMS_BYTES,
        "depth_max": ublk.QUEUE_DEPTH_MAX,
        "write_zeroes": ublk.OP_WRITE_ZEROES,
        "fua": ublk.IO_FUA,
        "nounmap": ublk.IO_NOUNMAP,
        "recovery": ublk.USER_RECOVERY | ublk.USER_RECOVERY_REISSUE,
        "quiesced": ublk.QUIESCED,
    }
    assert {name: int(said[name]) for name in numbers} == numbers


def test_a_read_only_device_of_4096_byte_blocks_says_so() -> None:
    packed = ublk.pack_parameters(ublk.Parameters(1 << 30, 4096, read_only=True), 524288)
    attributes, logical, physical = struct.unpack_from("<IBB", packed, 8)
    assert (attributes, logical, physical) == (ublk.READ_ONLY, 12, 12)


def test_a_mark_tells_volumes_and_snapshots_apart() -> None:
    identities = ["a", "b", "a@one", "a@two", "b@one"]
    marks = {ublk.mark_of(identity) for identity in identities}
    assert len(marks) == len(identities)
    assert all(0 < mark < 1 << 64 for mark in marks)


def test_without_the_driver_one_sentence_says_why() -> None:
    reason = UblkFrontEnd().unavailable()
    if reason is None:
        pytest.skip("this machine has the driver")
    assert "\n" not in reason
    assert any(word in reason for word in ("root", "io_uring", "/dev/ublk-control", "kernel"))


def test_what_is_locked_does_not_include_data_files(tmp_path: Path) -> None:
    """In a process of its own: locking memory is for life."""
    script = (
        "import os, sys\n"
        "from blockd.daemons.memory import protect\n"
        "from snapshots.syscalls import map_shared\n"
        "undone = protect()\n"
        "if any(line.startswith('mlockall') for line in undone): sys.exit(77)\n"
        f"fd = os.open({str(tmp_path / 'file')!r}, os.O_RDWR)\n"
        "memory = map_shared(fd, 64 << 20)\n"
        "maps = open('/proc/self/smaps').read()\n"
        "def flags(name): return maps[maps.index(name):].split('VmFlags:')[1].split('\\n')[0]\n"
        f"print('lo' in flags({str(tmp_path / 'file')!r}), 'lo' in flags('[heap]'))\n"
    )
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 64 << 20)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this process may not lock memory")
    assert done.stdout.split() == ["False", "True"], done.stdout + done.stderr
