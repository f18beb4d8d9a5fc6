"""What users may ask for: settings, numbers, paths. Each refuses with RequestError."""

from __future__ import annotations

import os

from blockd.node.objects import VolumeSpec
from protocol.errors import RequestError
from protocol.units import check_min_in_sync, check_rate

REBUILD_WAIT_SECONDS_MAX = 7 * 86_400
MOUNT_PATH_BYTES_MAX = 4095  # PATH_MAX without the final zero


def check_settings(spec: VolumeSpec) -> None:
    """Can a volume be kept like this?"""
    check_range("rebuild wait", spec.rebuild_wait_seconds, 0, REBUILD_WAIT_SECONDS_MAX)
    if spec.rebuild_bandwidth is not None:
        check_rate(spec.rebuild_bandwidth)
    check_min_in_sync(spec.min_in_sync)
    if spec.min_in_sync > spec.replicas:
        raise RequestError(
            f"min-in-sync {spec.min_in_sync} is above the {spec.replicas} replicas of the volume; "
            "no write would ever be answered"
        )


def check_range(what: str, value: float, least: float, most: float) -> None:
    """Is a number within its limits?"""
    if not least <= value <= most:
        raise RequestError(f"{what} {value:g} is outside {least:g} to {most:g}")


def check_program(path: str) -> str:
    """The Python of an installation."""
    if not path.startswith("/") or not os.access(path, os.X_OK) or os.path.isdir(path):
        raise RequestError(
            f"program {path!r} is not an executable file with an absolute path; name the Python "
            "of an installation of blockd, such as /opt/blockd/bin/python"
        )
    return path


def check_path(path: str) -> str:
    """A mount point, normalised."""
    if not path.startswith("/") or "\0" in path or len(os.fsencode(path)) > MOUNT_PATH_BYTES_MAX:
        raise RequestError(f"mount point {path!r} is not usable; give an absolute path")
    clean = os.path.normpath(path)
    if clean == "/":
        raise RequestError("mount point / is the root of this machine; choose another directory")
    return clean
