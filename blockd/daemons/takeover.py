"""The successor's side of a hand-over; handover.py has the steps and what a death means."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from typing import Any

from blockd.daemons import addresses, handover, process
from blockd.daemons.handshake import GivenSession
from blockd.daemons.local_member import LocalSession
from blockd.daemons.members import Introduced
from blockd.daemons.nbd_server import NbdConnection, Parting
from blockd.daemons.opening import take_up
from blockd.daemons.options import Options
from blockd.daemons.ublk import UblkDevice
from blockd.daemons.volume import VolumeDaemon
from blockd.loop import Loop
from protocol.errors import BlockdError, ConflictError, PeerError, StateError, from_code
from replication.authority import Authority, Record

ASKED_SECONDS_MAX = 60.0  # a snapshot or a flush of the old daemon may come first
STEP_SECONDS_MAX = 10.0
LINE_BYTES_MAX = 1 << 20


def take_over(loop: Loop, authority: Authority, options: Options) -> VolumeDaemon:
    """Ask the volume daemon at the control socket for everything; serves when this returns."""
    assert options.control is not None
    with _ask(options.control) as channel:
        taken = _Taken()
        try:
            state, descriptors, rest = handover.receive(channel)
            daemon = _build(loop, authority, options, state, descriptors, rest, taken)
            channel.sendall(handover.TAKEN)
            if channel.recv(len(handover.GO)) != handover.GO:
                raise StateError("the old volume daemon did not hand over and goes on by itself")
        except OSError as error:
            taken.give_back()
            raise PeerError(f"the old volume daemon did not hand over: {error}") from None
        except BaseException:
            taken.give_back()
            raise
    daemon.serve_on(taken.listening)
    for connection in tuple(daemon.connections):
        connection.go_on_again()
    for snapshot in state.get("devices", []):
        daemon.ublk.attach(str(snapshot), 1, _attached)
    daemon.send_everything()
    return daemon


def _attached(device: UblkDevice | None, error: BlockdError | None) -> None:
    if error is not None:
        process.log(f"a device was not taken over: {error}")  # the node service will ask again


class _Taken:
    """What was taken and is not served yet."""

    def __init__(self) -> None:
        self.local: list[LocalSession] = []
        self.listening: dict[str, socket.socket] = {}

    def give_back(self) -> None:
        """Close replicas in this process, so that the old daemon can take them up again."""
        for session in self.local:
            session.close()


def _ask(control: str) -> socket.socket:
    """The connection on which the old daemon hands over; its refusal as the error it names."""
    name, secret = os.urandom(16).hex(), os.urandom(16).hex()
    with (
        addresses.connect(control, STEP_SECONDS_MAX) as asked,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        listener.bind(handover.listening_name(name))
        listener.listen()
        request = {
            "command": "hand-over",
            "formats": [handover.FORMAT],
            "to": name,
            "secret": secret,
        }
        asked.sendall(json.dumps(request).encode() + b"\n")
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(asked, select.POLLIN)
        deadline = time.monotonic() + ASKED_SECONDS_MAX
        while True:
            seconds = max(0.0, deadline - time.monotonic())
            ready = [descriptor for descriptor, _ in poll.poll(seconds * 1000)]
            if listener.fileno() in ready:
                channel = listener.accept()[0]
                channel.settimeout(STEP_SECONDS_MAX)
                with contextlib.suppress(OSError, PeerError):
                    if bytes(handover.exactly(channel, len(secret))) == secret.encode():
                        return channel
                channel.close()  # names of this kind can be seen by everybody on this machine
            elif ready:
                break
            else:
                raise PeerError(
                    f"the volume daemon at {control} did not begin to hand over within "
                    f"{ASKED_SECONDS_MAX:g} s"
                )
        with asked.makefile("rb") as lines:
            line = lines.readline(LINE_BYTES_MAX)
    if not line.endswith(b"\n"):
        raise PeerError(f"the volume daemon at {control} ended before it handed over")
    answer = json.loads(line)
    raise from_code(str(answer.get("code")), str(answer.get("message")))


def _build(
    loop: Loop,
    authority: Authority,
    options: Options,
    state: dict[str, Any],
    descriptors: list[int],
    rest: memoryview,
    taken: _Taken,
) -> VolumeDaemon:
    """The whole volume daemon from what the old one gave; it begins no request yet."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    sockets = iter([socket.socket(fileno=descriptor) for descriptor in descriptors])
    record = _record(authority, options, state)
    sessions: dict[str, Introduced] = {}
    for member in state["members"]:
        address = str(member["address"])
        if "hello" in member:
            session = GivenSession(address, member["hello"], next(sockets))
            sessions[member["replica_uuid"]] = session
    for member in state["members"]:
        address = str(member["address"])
        if "hello" not in member:
            local = take_up(loop, address, record)
            taken.local.append(local)
            if not local.service.clean_start:
                raise StateError(f"the replica at {address} was not closed cleanly")
            sessions[member["replica_uuid"]] = local
    daemon = VolumeDaemon(loop, authority, record, sessions, options, int(state["sequence"]))
    daemon.ledger.count = int(state["changes"])
    for name in handover.COUNTERS:
        setattr(daemon.engine, name, int(state["counters"][name]))
    for member in state["members"]:
        link = daemon.engine.links[member["replica_uuid"]]
        link.errors, link.repaired_blocks = int(member["errors"]), int(member["repaired"])
    daemon.members.bytes_per_second = state["rebuild_bandwidth"]
    taken.listening = {str(address): next(sockets) for address in state["listening"]}
    position = 0
    for facts in state["clients"]:
        unread = bytes(rest[position : position + facts["unread"]])
        position += len(unread)
        unsent = bytes(rest[position : position + facts["unsent"]])
        position += len(unsent)
        drained = facts["drained"]
        parting = Parting(
            export=str(facts["export"]),
            size_bytes=int(facts["size_bytes"]),
            structured=bool(facts["structured"]),
            contexts=tuple((int(number), str(name)) for number, name in facts["contexts"]),
            draining_bytes=int(facts["draining_bytes"]),
            drained=tuple(drained) if drained is not None else None,
            unread=unread,
            unsent=unsent,
            address=str(facts.get("address", "")),
        )
        sock = next(sockets)
        sock.setblocking(False)
        connection = NbdConnection(daemon, sock, parting.address)
        daemon.connections.append(connection)
        connection.resume_from(parting)
    return daemon


def _record(authority: Authority, options: Options, state: dict[str, Any]) -> Record:
    """The record the old daemon has; nobody may have changed it meanwhile."""
    record = authority.load(str(state["volume_uuid"]))
    if record is None or record.volume_name != options.name:
        raise ConflictError(
            f"{options.control} belongs to volume {state['volume_uuid']}, which is not "
            f"{options.name} in {options.state}"
        )
    if record.epoch != state["epoch"] or record.version != state["version"]:
        raise ConflictError(
            f"volume {options.name} was changed by somebody else (epoch {record.epoch}, version "
            f"{record.version}; handed over are {state['epoch']} and {state['version']})"
        )
    return record
