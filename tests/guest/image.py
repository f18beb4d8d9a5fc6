"""Kernel and root file system of the guest, made once and kept.

Debian bookworm with the cloud kernel of its backports, which has the modules nbd and ublk_drv, and
the Python packages of pyproject.toml in /opt/python. The source tree is not in it: it comes as a
disk at each boot, so that an edit needs no new image. `python -m tests.guest.image` makes it.

Invariants:
- A directory of the cache is named by the checksum of everything it was made from, and is
  complete: it is made under another name and renamed.
- Debian's mirror is the one this machine's apt uses, or $BLOCKD_GUEST_MIRROR.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RECIPE = Path(__file__).parent / "root"
PYPROJECT = REPOSITORY / "pyproject.toml"
SUITE = "bookworm"
KERNEL_SUITE = "bookworm-backports"  # 6.12; bookworm's own 6.1 has an older ublk
PACKAGES = (
    *("dbus", "e2fsprogs", "fdisk", "fio", "fuse3", "iproute2", "kmod", "libnbd-bin", "mount"),
    *("nbd-client", "procps", "python3", "python3-libnbd", "systemd-sysv", "udev", "util-linux"),
    "xfsprogs",
)
PYTHON_PACKAGES = ("pyroute2", "pytest")  # besides those of pyproject.toml
PYTHON_VERSION = "3.11"  # bookworm's
LEFT_OUT = ("doc", "info", "locale", "man")  # of /usr/share
ROOT_BYTES = 2 << 30  # sparse; 0.4 GiB are used
BUILD_SECONDS_MAX = 900.0
LOG_LINES = 25  # of a failed build, in its error
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "setpriv": "util-linux",
}
SBIN = ("/usr/sbin", "/sbin")  # not on everybody's PATH


class ImageError(Exception):
    """The image could not be made; the message ends with what the failed command said."""


@dataclass(frozen=True)
class Image:
    """What a guest boots from. Guests never change it."""

    kernel: Path
    root: Path


def image() -> Image:
    """The image, made now if it is not there. Raises ImageError."""
    directory = cache() / key()
    if not directory.exists():
        cache().mkdir(parents=True, exist_ok=True)
        with (cache() / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not directory.exists():
                _make(directory)
    return Image(directory / "vmlinuz", directory / "root.img")


def missing() -> str | None:
    """Why no guest can run on this machine, or None."""
    if platform.machine() != "x86_64":
        return f"the guest is an x86_64 machine, this one is {platform.machine()}"
    wanted = [f"{tool} (package {package})" for tool, package in TOOLS.items() if not find(tool)]
    if wanted:
        return f"not installed: {', '.join(wanted)}"
    if (cache() / key()).exists():
        return None
    if os.geteuid() != 0:
        return "making the guest's image needs root: sudo make guest, once"
    if mirror() is None:
        return "no Debian mirror in this machine's apt sources; set BLOCKD_GUEST_MIRROR to one"
    return None


def find(tool: str) -> str | None:
    """Where a tool is, or None."""
    return shutil.which(tool, path=os.pathsep.join((os.environ.get("PATH", ""), *SBIN)))


def cache() -> Path:
    """Where images are kept."""
    chosen = os.environ.get("BLOCKD_GUEST_CACHE")
    return Path(chosen).absolute() if chosen else REPOSITORY / ".cache" / "guest"


def key() -> str:
    """The checksum of everything the image is made from, but for the mirror's content."""
    made_of = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(RECIPE.iterdir()):
        made_of.update(path.name.encode() + b"\0" + path.read_bytes())
    made_of.update("\n".join(_requirements()).encode())
    return made_of.hexdigest()[:16]


def mirror() -> str | None:
    """Address of the Debian mirror that apt uses here."""
    if chosen := os.environ.get("BLOCKD_GUEST_MIRROR"):
        return chosen
    if not shutil.which("apt-get"):
        return None
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    for line in listed.splitlines():
        origin, label, address = line.split("|", 2)
        if origin == label == "Debian":  # and not security, whose label says so
            return address
    return None


def _requirements() -> list[str]:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return [*project["dependencies"], *PYTHON_PACKAGES]


def _make(directory: Path) -> None:
    """Make the image beside `directory`, then rename it. The cache's lock is held."""
    for left in cache().glob("*.part"):
        shutil.rmtree(left)
    part = directory.with_name(directory.name + ".part")
    part.mkdir()
    try:
        with tempfile.TemporaryDirectory(prefix="guest-python-") as packages:
            pip = _start(_pip(Path(packages)), part / "pip.log")
            try:
                _finish(_start(_mmdebstrap(part), part / "mmdebstrap.log"), part)
                _finish(pip, part)
            finally:
                if pip.poll() is None:
                    pip.kill()
                    pip.wait()
            root = part / "root"
            shutil.copytree(packages, root / "opt" / "python", symlinks=True)
        _furnish(root)
        compiled = ["chroot", str(root), "python3", "-m", "compileall", "-q", "/opt/python"]
        _finish(_start(compiled, part / "chroot.log"), part)
        _finish(_start(_mke2fs(root, part / "root.img", ROOT_BYTES), part / "mke2fs.log"), part)
        shutil.rmtree(root)
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _pip(target: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check"),
        *("--target", str(target), "--no-compile", "--only-binary", ":all:"),
        *("--implementation", "cp", "--python-version", PYTHON_VERSION),
        *("--platform", "manylinux2014_x86_64", "--platform", "manylinux_2_28_x86_64"),
        *_requirements(),
    ]


def _mmdebstrap(part: Path) -> list[str]:
    address = mirror()
    hook = [str(RECIPE / "kernel.sh"), KERNEL_SUITE, str(part / "vmlinuz")]
    return [
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=essential"),
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in LEFT_OUT),
        f'--customize-hook=sh {shlex.quote(hook[0])} "$1" {shlex.join(hook[1:])}',
        *(SUITE, str(part / "root")),
        *(f"deb {address} {suite} main" for suite in (SUITE, f"{SUITE}-updates", KERNEL_SUITE)),
    ]


def _furnish(root: Path) -> None:
    """What makes the root file system a guest: mount point, first process, agent."""
    (root / "src").mkdir()
    for name in ("guest-init", "guest-agent"):
        shutil.copy(RECIPE / name, root / "usr" / "sbin" / name)
    units = root / "etc" / "systemd" / "system"
    shutil.copy(RECIPE / "guest-agent.service", units)
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "guest-agent.service").symlink_to("../guest-agent.service")


def make_disk(source: Path, target: Path, size_bytes: int) -> None:
    """A sparse ext4 image with the content of a directory. Raises ImageError."""
    log = target.with_name(target.name + ".log")
    _finish(_start(_mke2fs(source, target, size_bytes), log), log.parent)


def _mke2fs(source: Path, target: Path, size_bytes: int) -> list[str]:
    mke2fs = find("mke2fs")
    assert mke2fs, "asked for only where missing() says nothing"
    return [
        *(mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", str(source)),
        *(str(target), f"{size_bytes >> 10}k"),
    ]


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join((os.environ.get("PATH", ""), *SBIN))
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PATH": path, "LC_ALL": "C"},
        )


def _finish(process: subprocess.Popen[bytes], logs: Path) -> None:
    assert isinstance(process.args, list)
    name = Path(process.args[0]).name
    name = "pip" if "pip" in process.args else name
    try:
        code: int | str = process.wait(BUILD_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = f"nothing within {BUILD_SECONDS_MAX:g} s"
    if code != 0:
        said = "\n".join(
            line
            for log in sorted(logs.glob("*.log"))
            if log.name.startswith(name)
            for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        )
        raise ImageError(f"the guest's image: {name} ended with {code}:\n{said}")


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"guest: {reason}")
    print(image().root.parent)
