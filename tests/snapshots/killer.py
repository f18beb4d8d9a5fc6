"""A process that ends before a system call of its choice."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from snapshots import syscalls


class Killed(BaseException):
    """The process ends here."""


class Killer:
    """Raises Killed instead of the n-th call that changes a file."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls_left = -1
        for module, name in (
            (os, "pwrite"),
            (os, "pwritev"),
            (os, "ftruncate"),
            (os, "rename"),
            (os, "link"),
            (os, "unlink"),
            (os, "fsync"),
            (os, "fdatasync"),
            (syscalls, "_fallocate"),
        ):
            patch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if self.calls_left == 0:
                raise Killed
            self.calls_left -= 1
            return function(*arguments)

        return counted
