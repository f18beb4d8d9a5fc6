"""Proves that volumes on kernel devices are upgraded under a busy file system without an error.

Needs root and the drivers; on machines without them, tests/guest/test_upgrades.py runs this file in
a guest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.frontends import FRONT_ENDS
from tests.blockd.node_harness import WAIT_SECONDS, NodeHarness, until

COUNT = int(os.environ.get("BLOCKD_TEST_UPGRADES", "20"))


@pytest.mark.parametrize("front_end", ["nbd", "ublk"])
def test_upgrades_in_a_row_are_pauses(node: NodeHarness, front_end: str) -> None:
    reason = FRONT_ENDS[front_end].unavailable()
    if reason is not None:
        pytest.skip(f"{front_end}: {reason}")
    node.create("data", replicas=2, rebuild_wait_seconds=3600)
    node.attach("data", front_end)
    view = node.operations.mount("data", None, "ext4", WAIT_SECONDS)
    assert view.mount
    where = Path(view.mount.path)
    words = ["fio", "--name=busy", f"--directory={where}", "--rw=randrw", "--bs=4k", "--size=16M"]
    words += ["--ioengine=psync", "--direct=1", "--verify=crc32c", "--verify_fatal=1"]
    words += ["--time_based", "--runtime=3600", "--output-format=json", "--fallocate=none"]
    fio = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        until(lambda: any(where.glob("busy.*")), "fio has begun")
        for _ in range(COUNT):
            before = node.view("data").pid
            node.operations.upgrade("data", None, 2 * WAIT_SECONDS)
            after = node.view("data")
            assert after.pid != before
            assert after.device == view.device
            assert fio.poll() is None, fio.stdout.read() if fio.stdout else ""
    finally:
        fio.terminate()
        assert fio.stdout
        said = fio.stdout.read().decode()
        fio.wait()
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > COUNT
    longest = max(job[way]["clat_ns"]["max"] / 1e9 for way in ("read", "write"))
    print(f"STALL of {COUNT} upgrades on {front_end}: {longest:.2f} s", file=sys.__stderr__)
    assert " rw," in next(
        line for line in Path("/proc/mounts").read_text().splitlines() if str(where) in line
    )
    assert node.view("data").epoch == 1  # nobody had to open the volume anew
