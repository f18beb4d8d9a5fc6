"""`blockd volume import` and `export`: disk images in and out of volumes, by qemu-img.

qemu-img reads and writes every format it knows (raw, qcow2, vmdk, ...; nbd:// addresses too) and
skips holes on both sides. The volume is its NBD address, so the node service must run on this
machine. An import that fails removes the volume it has made; an export writes to FILE.part and
renames it, so FILE is there only when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from blockd.cli import output as out
from blockd.cli.common import (
    Settings,
    output_option,
    pass_settings,
    progress,
    refuse,
    replicas_option,
    timeout_option,
)
from blockd.client import Client, Json
from blockd.frontends import tools
from protocol.errors import BlockdError, ConflictError, NotFoundError, StorageError
from protocol.units import (
    BLOCK_BYTES,
    NAME_PATTERN,
    SIZE_BYTES_MIN,
    check_name,
    check_size,
    parse_size,
)

FORMATS = ("raw", "qcow2")
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_ADDRESS = re.compile(r"[a-z+]+://")


@click.command(
    name="import",
    epilog="""\b
Examples:
  blockd volume import data disk.qcow2
  blockd volume import data nbd://backup.example/disk --replicas 2 --size 20G
""",
)
@click.argument("name", metavar="NAME")
@click.argument("source", metavar="FILE|nbd://ADDRESS")
@click.option("--size", metavar="SIZE", help="Larger than the image, such as 20G.")
@replicas_option
@timeout_option
@output_option
@pass_settings
def import_image(
    settings: Settings,
    name: str,
    source: str,
    size: str | None,
    replicas: int,
    timeout: float,
    output: str,
) -> None:
    """Make a volume from a disk image; holes of the image take no space."""
    check_name("volume", name)
    _check_local(settings)
    if not _ADDRESS.match(source) and not os.path.exists(source):
        raise NotFoundError(f"{source} does not exist; name a disk image, or an nbd:// address")
    info = json.loads(tools.run("qemu-img", ["info", "--output", "json", source]))
    image_bytes = int(info["virtual-size"])
    wanted = parse_size(size) if size else max(image_bytes, SIZE_BYTES_MIN)
    wanted = -(-wanted // BLOCK_BYTES) * BLOCK_BYTES
    if wanted < image_bytes:
        refuse(f"size {size} is below the {image_bytes} bytes of {source}")
    body = {"name": name, "size_bytes": check_size(wanted), "replicas": replicas}
    with settings.client() as client, progress(f"importing {name}") as report:
        client.volume_create(body, wait=timeout)
        try:
            with attached(client, name, timeout) as uri:
                # Larger than the image: it is written to the beginning of the volume.
                target = _part_of(uri, image_bytes)
                words = ["-n", "--target-is-zero", "--target-image-opts", source, target]
                convert(words, report)
            made = client.volume(name)
        except BaseException:
            with suppress(BlockdError):
                client.volume_delete(name, force=True, wait=timeout)
            raise
    out.show(made, output, lambda view: out.volume_table([view]))


@click.command(
    epilog="""\b
Examples:
  blockd volume export data data.img
  blockd volume export data@monday monday.qcow2 --format qcow2
"""
)
@click.argument("source", metavar="VOL[@SNAPSHOT]")
@click.argument("file", metavar="FILE")
@click.option(
    "--format",
    "image_format",
    type=click.Choice(FORMATS),
    default="raw",
    show_default=True,
    help="What kind of image to write.",
)
@timeout_option
@output_option
@pass_settings
def export(
    settings: Settings, source: str, file: str, image_format: str, timeout: float, output: str
) -> None:
    """Write a volume or a snapshot to a disk image; it may be in use.

    An image of a volume in use is what a disk holds after a power cut at some moment of the copy,
    and not of one moment: export a snapshot of it instead.
    """
    name, at, snapshot = source.partition("@")
    if not NAME_PATTERN.fullmatch(name) or (at and not NAME_PATTERN.fullmatch(snapshot)):
        refuse(f"{source!r} is not VOL or VOL@SNAPSHOT")
    _check_local(settings)
    if os.path.exists(file):
        raise ConflictError(f"{file} exists; remove it or choose another name")
    part = f"{file}.part"
    with settings.client() as client, progress(f"exporting {source}") as report:
        if snapshot:
            client.snapshot(name, snapshot)
        try:
            with attached(client, name, timeout) as uri:
                where = uri.replace(f"/{name}?", f"/{source}?")
                convert(["-f", "raw", "-O", image_format, where, part], report)
            os.rename(part, file)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(part)
    answer = {"file": file, "format": image_format, "bytes_on_disk": os.stat(file).st_blocks * 512}
    out.show(answer, output, out.pairs)


def _check_local(settings: Settings) -> None:
    if settings.url is not None:
        refuse(
            "images go through the volume's NBD socket on the machine of the node service; "
            "run this command there, without --url"
        )


@contextmanager
def attached(client: Client, name: str, timeout: float) -> Iterator[str]:
    """The NBD address of a volume, which is attached for as long as that takes."""
    before: Json = client.volume(name)
    view = before
    if before.get("nbd_uri") is None:
        view = client.attach(name, "socket", wait=timeout)
    try:
        yield str(view["nbd_uri"])
    finally:
        if before.get("nbd_uri") is None:
            client.detach(name, wait=timeout)


def _part_of(uri: str, size: int) -> str:
    """The beginning of an NBD export as a qemu image of exactly that size."""
    whole = -(-size // 512) * 512
    path, _, query = uri.partition("://")[2].partition("?socket=")
    words = {"driver": "raw", "size": whole, "file.driver": "nbd", "file.server.type": "unix"}
    words |= {"file.server.path": query, "file.export": path.lstrip("/")}
    return ",".join(f"{key}={str(value).replace(',', ',,')}" for key, value in words.items())


def convert(words: list[str], report: Callable[[float, str], None]) -> None:
    """Run `qemu-img convert`; its progress goes to `report`, its complaint into the error."""
    command = [tools.require("qemu-img"), "convert", "-p", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            while said := os.read(process.stdout.fileno(), 4096):
                shares: list[Any] = _PERCENT.findall(said)
                if shares:
                    report(float(shares[-1]) / 100, "")
        except BaseException:
            process.kill()
            raise
        complaint = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise StorageError(f"qemu-img failed: {complaint.splitlines()[-1] if complaint else ''}")
