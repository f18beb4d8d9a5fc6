"""What operations have in common: finding objects, waiting for a status, saying what went wrong."""

from __future__ import annotations

import time
from collections.abc import Callable

from blockd.frontends import check as check_front_end
from blockd.frontends import choose
from blockd.node.context import Context
from blockd.node.objects import Problem, Volume
from blockd.node.store import find, modify
from blockd.node.supervisor import DaemonSpec
from blockd.node.views import VolumeView, volume_view
from protocol.errors import ConflictError, DeadlineError, NotFoundError, from_code
from replication.authority import Record

POLL_SECONDS = 0.05


class OperationsCommon:
    """The base of all operations."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._store = context.store

    def volume(self, name: str) -> VolumeView:
        """One volume."""
        return volume_view(self._context, self._volume(name))

    def _volume(self, name: str) -> Volume:
        item = find(self._store, Volume, name)
        if item is None:
            raise NotFoundError(f"volume {name} does not exist; see `blockd volume ls`")
        return item

    def _running_daemon(self, volume: str, what_for: str) -> DaemonSpec:
        item = self._volume(volume)
        daemon = self._context.volume_daemon(item, [])
        if not item.spec.attached or not daemon.control.exists():
            raise ConflictError(
                f"volume {volume} is not attached, and its volume daemon {what_for}; "
                f"attach it first: `blockd volume attach {volume}`"
            )
        return daemon

    def _record(self, volume: str) -> Record | None:
        return self._context.authority.load(self._volume(volume).metadata.uid)

    def _await(
        self,
        wanted: Volume,
        done: Callable[[Volume], bool],
        wait_seconds: float,
        what: str,
        undo: Callable[[Volume], None] | None = None,
    ) -> None:
        """Wait until `done`; a problem that waiting cannot solve is raised, after `undo`."""
        name, generation = wanted.metadata.name, wanted.metadata.generation
        deadline = time.monotonic() + wait_seconds
        while wait_seconds > 0:
            item = self._volume(name)
            settled = item.status.observed_generation >= generation
            if settled and item.status.problem is None and done(item):
                return
            if settled and item.status.problem is not None and not item.status.problem.retry:
                if undo is not None:
                    modify(self._store, Volume, name, undo)
                refuse_if_final(item.status.problem)
            if time.monotonic() > deadline:
                raise DeadlineError(late(f"volume {name} is not {what}", wait_seconds, item))
            time.sleep(POLL_SECONDS)


def check_attaching(what: str, attached: bool, current: str | None, front_end: str) -> None:
    """Refuse a front end that cannot be used, or another one than something is attached through."""
    check_front_end(front_end)
    if attached and front_end not in ("auto", current or front_end):
        raise ConflictError(
            f"{what} is attached through {current}; detach it first to use {front_end}"
        )
    choose(front_end)  # says what is missing before anything is started


def refuse(problem: Problem | None) -> None:
    if problem is not None:
        error = from_code(problem.code, problem.message)
        error.retry = problem.retry
        raise error


def refuse_if_final(problem: Problem | None) -> None:
    if problem is not None and not problem.retry:
        refuse(problem)


def late(what: str, wait_seconds: float, item: Volume) -> str:
    reason = item.status.problem.message if item.status.problem else item.status.message
    return f"{what} after {wait_seconds:g} s and still wanted" + (f": {reason}" if reason else "")
