"""Fixtures of the tests with a real kernel; they skip where no guest can run, and say why."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.guest.image import Image, image, missing
from tests.guest.machine import Guest

GIB = 1 << 30
EVERYTHING = os.environ.get("BLOCKD_GUEST") == "all"  # `make guest`; `make test` runs a short form
DATA = "/data"  # the shared guest's own disk, ext4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the short form, tests that are marked `long` are left out."""
    if EVERYTHING:
        return
    long = [item for item in items if item.get_closest_marker("long") is not None]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture(scope="session")
def guest_image() -> Image:
    """Kernel and root file system, made if needed."""
    if reason := missing():
        pytest.skip(f"no guest: {reason}")
    return image()


@pytest.fixture(scope="session")
def shared_guest(guest_image: Image) -> Iterator[Guest]:
    """The machine behind `guest`."""
    with (
        temporary_directory() as directory,
        Guest(directory, guest_image, disks={"data": 4 * GIB}) as machine,
    ):
        machine.shell("mkfs.ext4 -q /dev/vdb")
        _mount_data(machine)
        yield machine


@pytest.fixture
def guest(shared_guest: Guest) -> Guest:
    """A booted machine that all tests share, with 4 GiB at /data. Leave it as you found it.

    If a test has killed it, the next one gets it booted again.
    """
    if shared_guest.pid is None:
        shared_guest.boot()
        _mount_data(shared_guest)
    return shared_guest


@pytest.fixture
def own_guest(guest_image: Image) -> Iterator[Callable[..., Guest]]:
    """The test's own machine: `own_guest(memory_mib=512, disks={"a": BYTES}, init="systemd")`."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Guest:
            directory = stack.enter_context(temporary_directory())
            return stack.enter_context(Guest(directory, guest_image, **options))

        yield make


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory for a guest's disks, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="guest-") as name:
        yield Path(name)


def _mount_data(machine: Guest) -> None:
    machine.shell(f"mkdir -p {DATA}; mount /dev/vdb {DATA}")
