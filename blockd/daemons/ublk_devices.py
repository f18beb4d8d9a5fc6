"""The ublk devices of a volume daemon: made, taken over from a dead daemon, removed.

The kernel's control commands block, some until the device is served, so each runs in a thread of
its own beside the loop; one change of a device at a time.

attach: a device that carries our mark (kernel/ublk.py) waits for a server: take it over. Else add
one. Then fetch all tags in the loop, and let the kernel go on (START_DEV, END_USER_RECOVERY).

If the daemon dies in between, the next attach finds the device as it is then: one that was added
and not started is deleted and made anew, one that was being taken over is taken over again.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blockd.daemons import process
from blockd.daemons.ublk import DEPTH, IO_BYTES_MAX, UblkDevice
from blockd.kernel import ublk
from protocol.errors import BlockdError, StateError
from replication.turns import Turns

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon

GONE_SECONDS_MAX = 15.0  # a killed server still ends its requests and unmaps its memory
POLL_SECONDS = 0.005

Done = Callable[[UblkDevice | None, BlockdError | None], None]


class UblkDevices:
    """All ublk devices of one volume daemon."""

    def __init__(self, daemon: VolumeDaemon) -> None:
        self._daemon = daemon
        self._turns = Turns()

    @property
    def busy(self) -> bool:
        """Is a device being made, taken over or removed?"""
        return self._turns.busy

    def status(self) -> list[dict[str, Any]]:
        """Each device: number, path, which snapshot (empty: the live volume), state."""
        return [
            {
                "id": device.info.id,
                "path": device.info.path,
                "snapshot": device.snapshot,
                "layer_id": device.layer_id,
                "state": device.state,
                "queues": device.info.queues,
                "depth": device.info.depth,
            }
            for device in self._daemon.devices
        ]

    # ---- attach ---------------------------------------------------------------------------

    def attach(self, snapshot: str, queues: int, done: Done) -> None:
        """Serve the live volume, or a snapshot, as a ublk device; fine if that is done already."""
        found: list[UblkDevice] = []

        def work(end: Callable[[BlockdError | None], None]) -> None:
            served = self._find(snapshot)
            if served is not None:
                found.append(served)
                end(None)
            else:
                self._attach(snapshot, queues, found, end)

        self._turns.take(work, lambda error: done(found[0] if not error else None, error))

    def _attach(
        self,
        snapshot: str,
        queues: int,
        found: list[UblkDevice],
        end: Callable[[BlockdError | None], None],
    ) -> None:
        daemon = self._daemon
        record = daemon.engine.record
        layer_id = daemon.structure.find(snapshot).id if snapshot else 0
        mark = self._mark(snapshot)
        parameters = ublk.Parameters(
            record.size_bytes, daemon.options.block_size, read_only=bool(snapshot)
        )

        def prepared(result: tuple[ublk.Info, bool] | None, error: BlockdError | None) -> None:
            if result is None:
                end(error)
                return
            info, recovering = result
            device = UblkDevice(daemon, info, snapshot, layer_id)
            device.state = "recovering" if recovering else "starting"
            try:
                device.open()
            except OSError as failure:
                end(_error(f"{info.character_path} cannot be served", failure))
                return
            daemon.devices.append(device)
            what = "taken over" if recovering else "added"
            process.log(f"{info.path} {what}: {info.queues} queues of {info.depth}")
            self._aside(lambda: _start(info, recovering), started(device))

        def started(device: UblkDevice) -> Callable[[None, BlockdError | None], None]:
            def run(result: None, error: BlockdError | None) -> None:
                if error is None:
                    device.state = "live"
                    found.append(device)
                    end(None)
                else:
                    daemon.device_stopped(device)
                    end(error)

            return run

        self._aside(lambda: _prepare(mark, queues, parameters), prepared)

    # ---- detach ---------------------------------------------------------------------------

    def detach(self, snapshot: str, done: Callable[[BlockdError | None], None]) -> None:
        """Stop and delete a device, whoever served it; fine if there is none."""
        mark = self._mark(snapshot)

        def work(end: Callable[[BlockdError | None], None]) -> None:
            def stopped(info: ublk.Info | None, error: BlockdError | None) -> None:
                device = self._find(snapshot)
                if device is not None and error is None:
                    self._daemon.device_stopped(device)
                if info is None or error is not None:
                    end(error)
                else:
                    number = info.id
                    self._aside(lambda: _delete(number), lambda result, error: end(error))

            self._aside(lambda: _stop(mark), stopped)

        self._turns.take(work, done)

    def _mark(self, snapshot: str) -> int:
        volume_uuid = self._daemon.engine.record.volume_uuid
        return ublk.mark_of(f"{volume_uuid}@{snapshot}" if snapshot else volume_uuid)

    def _find(self, snapshot: str) -> UblkDevice | None:
        return next((each for each in self._daemon.devices if each.snapshot == snapshot), None)

    # ---- threads --------------------------------------------------------------------------

    def _aside(
        self, work: Callable[[], Any], done: Callable[[Any, BlockdError | None], None]
    ) -> None:
        """Run `work` in a thread of its own: it may wait for requests that the pool serves."""
        daemon = self._daemon

        def run() -> None:
            result, failure = None, None
            try:
                result = work()
            except BlockdError as error:
                failure = error
            except OSError as error:
                failure = _error("the ublk driver refused", error)
            daemon.loop.post(daemon.sending(lambda: done(result, failure)))

        threading.Thread(target=run, name="ublk-control", daemon=True).start()


def _error(what: str, error: OSError) -> BlockdError:
    return StateError(f"{what}: {error.strerror or error}", errno=error.errno)


def _prepare(mark: int, queues: int, parameters: ublk.Parameters) -> tuple[ublk.Info, bool]:
    """A device to be fetched from, and whether it has a past."""
    with ublk.Control() as control:
        found = control.find(mark)
        if found is not None and found.state != ublk.DEAD:
            return _take_over(control, found), True
        if found is not None:
            control.delete(found.id)
        wanted = ublk.USER_RECOVERY | ublk.USER_RECOVERY_REISSUE
        flags = control.features() & wanted | ublk.CMD_IOCTL_ENCODE
        order = ublk.Info(ublk.ANY_ID, 0, 0, flags, mark, queues, DEPTH, IO_BYTES_MAX)
        return control.add(order, parameters), False


def _take_over(control: ublk.Control, info: ublk.Info) -> ublk.Info:
    """Wait until the dead server is gone entirely; then its device is ours to fetch from."""
    deadline = time.monotonic() + GONE_SECONDS_MAX
    while True:
        try:
            control.start_recovery(info.id)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise StateError(
                    f"{info.path} is still served by process {info.pid}, "
                    f"{GONE_SECONDS_MAX:.0f} s after it was asked for; end that process"
                ) from None
            time.sleep(POLL_SECONDS)
        else:
            return control.info(info.id)


def _start(info: ublk.Info, recovering: bool) -> None:
    with ublk.Control() as control:
        if recovering:
            control.end_recovery(info.id, os.getpid())
        else:
            control.start(info.id, os.getpid())


def _stop(mark: int) -> ublk.Info | None:
    with ublk.Control() as control:
        found = control.find(mark)
        if found is not None:
            control.stop(found.id)
        return found


def _delete(number: int) -> None:
    with ublk.Control() as control:
        control.delete(number)
