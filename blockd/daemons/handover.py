"""A volume daemon hands over to its successor: what upgrades it while the volume is in use.

The successor (`blockd daemon volume ... --take-over`) starts beside the old one, so that its start
costs no pause, and asks for everything at the control socket. What goes over is the open volume
itself, not a new opening of it: the same epoch, the same sessions with the replicas, the same order
of changes, every listening and connected socket. Clients and replicas notice nothing but a pause.

    successor                              old one
    hand-over, where I listen,
    a secret                       ->      takes its turn among the changes of the structure,
                                           aborts rebuilds, begins no request any more, waits
                                           until all that were begun are answered
                                           closes replicas in this process
                                   <-      the secret, state, descriptors, bytes not begun
    opens these replicas, builds
    everything, serves nothing
    taken                          ->
                                   <-      go; ends at once, touching nothing
    serves

Exactly one of them serves at any time: the old one never after it has sent `go`, the successor
never before it has read it. If the successor dies, refuses or takes too long before that, the old
one kills it, takes up its replicas again and goes on. If the old one dies before `go`, the
successor ends: the volume is opened anew, as after any death of a volume daemon. If the successor
dies after it, the same. Nothing is answered and not applied on all members at that point, so no
step can lose a write. After `go` nothing that fails may end the successor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import struct
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockd.daemons import process
from blockd.daemons.control import Answer
from blockd.daemons.member_socket import MemberSocket
from protocol.errors import BlockdError, PeerError, RequestError, StateError
from replication.turns import Done

if TYPE_CHECKING:
    from blockd.daemons.volume import VolumeDaemon

FORMAT = 1  # of the state; the successor names those it understands
QUIET_SECONDS_MAX = 2.0  # clients wait meanwhile: a flush of a slow disk has to be through by then
TAKEN_SECONDS_MAX = 3.0  # clients wait meanwhile, too
HANDSHAKE_SECONDS_MAX = 0.1  # a client that has not chosen an export by then is sent away
END_SECONDS_MAX = 2.0  # of a successor that has lost its connection; then it is killed
KILLED_SECONDS_MAX = 10.0
LOOK_SECONDS = 0.001
SECRET = re.compile(r"[0-9a-f]{32}")
COUNTERS = (
    "reads_total",
    "read_bytes",
    "writes_total",
    "written_bytes",
    "zeros_total",
    "flushes_total",
    "checksum_errors",
)
_DESCRIPTORS_MAX = 200  # in one message; Linux takes 253 (SCM_MAX_FD)
_HEAD = struct.Struct("<IQI")  # bytes of the state, of what follows it, descriptors
TAKEN, GO = b"taken\n", b"go\n"


def send(sock: socket.socket, state: dict[str, Any], descriptors: list[int], rest: bytes) -> None:
    """Send one state with its descriptors and bytes."""
    content = json.dumps(state).encode()
    sock.sendall(_HEAD.pack(len(content), len(rest), len(descriptors)))
    for start in range(0, len(descriptors), _DESCRIPTORS_MAX):
        socket.send_fds(sock, [b"d"], descriptors[start : start + _DESCRIPTORS_MAX])
    sock.sendall(content)
    sock.sendall(rest)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int], memoryview]:
    """What `send` sent; PeerError if it ends early."""
    content_bytes, rest_bytes, count = _HEAD.unpack(exactly(sock, _HEAD.size))
    descriptors: list[int] = []
    while len(descriptors) < count:
        data, received, _, _ = socket.recv_fds(sock, 1, _DESCRIPTORS_MAX)
        descriptors += received
        if not data or not received:
            raise PeerError("the other volume daemon ended in the middle of the hand-over")
    state = json.loads(bytes(exactly(sock, content_bytes)))
    return state, descriptors, exactly(sock, rest_bytes)


def listening_name(name: str) -> str:
    """Where a successor listens: an address of the abstract namespace, which leaves no file."""
    return f"\0blockd-{name}"


def exactly(sock: socket.socket, count: int) -> memoryview:
    """So many bytes; PeerError if the stream ends before."""
    data = memoryview(bytearray(count))
    position = 0
    while position < count:
        received = sock.recv_into(data[position:])
        if not received:
            raise PeerError("the other volume daemon ended in the middle of the hand-over")
        position += received
    return data


class HandOver:
    """One attempt of the old volume daemon."""

    def __init__(self, daemon: VolumeDaemon, request: dict[str, Any], answer: Answer) -> None:
        if FORMAT not in request["formats"]:
            raise RequestError(
                f"the successor understands hand-overs of the formats {request['formats']}, this "
                f"volume daemon only {FORMAT}; detach the volume and attach it again to change over"
            )
        self._daemon = daemon
        self._to, self._secret = str(request["to"]), str(request["secret"])
        if not SECRET.fullmatch(self._to) or not SECRET.fullmatch(self._secret):
            raise RequestError(
                "a successor names where it listens and a secret, 32 hex digits each"
            )
        self._answer = answer
        self._end: Done | None = None
        self._paused_at = 0.0  # when clients began to wait
        take = daemon.engine.changes.take
        daemon.loop.post(daemon.sending(lambda: take(self._begin, self._ended)))

    def _begin(self, end: Done) -> None:
        daemon, engine = self._daemon, self._daemon.engine
        self._end = end
        daemon.handing_over = True
        reason = self._unable()
        if reason is not None:  # nobody has to wait for that
            self._fail(StateError(f"volume {daemon.options.name} cannot be handed over: {reason}"))
            return
        daemon.abort_walks("another process takes the volume over")
        if any(link.is_local for link in engine.targets):
            engine.flush_then(self._flushed)  # closing the directory has little left to write then
            daemon.send_everything()
        else:
            self._quiet()

    def _flushed(self, error: BlockdError | None) -> None:
        if error is not None:
            self._fail(error)
        else:
            self._quiet()

    # ---- becoming quiet -------------------------------------------------------------------

    def _quiet(self) -> None:
        daemon = self._daemon
        for server in daemon.servers:
            server.pause()
        for connection in daemon.connections:
            if not connection.negotiating:
                connection.pause()
        for device in daemon.devices:
            device.pause()
        self._paused_at = daemon.loop.now()
        self._look()

    def _look(self) -> None:
        daemon = self._daemon
        daemon.send_everything()
        waited = daemon.loop.now() - self._paused_at
        if waited > HANDSHAKE_SECONDS_MAX:
            for connection in tuple(daemon.connections):
                if connection.negotiating or connection.ending:
                    connection.close("the volume daemon is replaced")
        reason = self._unable() or self._busy()
        if daemon.stopping:
            self._fail(StateError("the volume daemon stops"))
        elif reason is None:
            self._give()
        elif waited > QUIET_SECONDS_MAX:
            self._fail(
                StateError(
                    f"volume {daemon.options.name} cannot be handed over: after "
                    f"{QUIET_SECONDS_MAX:g} s there is still {reason}; it goes on as before, try "
                    "again later"
                )
            )
        else:
            daemon.loop.later(LOOK_SECONDS, self._look)

    def _unable(self) -> str | None:
        """What no short wait changes."""
        engine = self._daemon.engine
        if not engine.readers:
            return "no replica in sync is reachable"
        if engine.paused:
            return "the disk of a replica is full; free space there and try again"
        return None

    def _busy(self) -> str | None:
        """What is still under way."""
        daemon, engine = self._daemon, self._daemon.engine
        for connection in daemon.connections:
            if connection.negotiating or connection.ending:
                return "a client that comes or goes"
            if not connection.quiet:
                return "a request of a client that waits for a replica"
        if daemon.ublk.busy or not all(device.quiet for device in daemon.devices):
            return "a request of a kernel device"
        for member in daemon.members.sockets.values():
            link = member.link
            if link.leaving:
                return f"the loss of replica {link.replica_uuid}"
            if link not in engine.targets:
                continue  # its session ends with this process
            if link.queue or link.reads or link.calls:
                return f"a request to replica {link.replica_uuid}"
            if isinstance(member, MemberSocket) and member.inbox.end > member.inbox.start:
                return f"half an answer of replica {link.replica_uuid}"
        if engine.pending or engine.flushes or engine.locks.held:
            return "a change that is not on all replicas"
        if engine.rebuilds or engine.scrub is not None or daemon.ledger.busy:
            return "a change of the volume's record"
        if any(not link.connected for link in engine.targets):
            return "a replica that was lost"
        return None

    # ---- giving ---------------------------------------------------------------------------

    def _give(self) -> None:
        """Nothing is under way: hand over, in one go."""
        daemon = self._daemon
        channel = socket.socket(socket.AF_UNIX)
        try:
            channel.settimeout(TAKEN_SECONDS_MAX)
            channel.connect(listening_name(self._to))
            channel.sendall(self._secret.encode())
            content = self._state()
            daemon.members.close_local()
            send(channel, *content)
            answer = channel.recv(len(TAKEN))
            if answer != TAKEN:
                raise PeerError("it ended")
            channel.sendall(GO)
        except Exception as error:  # whatever it was, the volume goes on here
            failure = error
        else:
            process.log("handed over to the successor")
            os._exit(0)
        _end_peer(channel)
        self._fail(StateError(f"the successor did not take the volume: {failure}"))

    def _state(self) -> tuple[dict[str, Any], list[int], bytes]:
        """Everything a successor needs: facts, descriptors in the order the facts name them."""
        daemon, engine = self._daemon, self._daemon.engine
        record = engine.record
        members: list[dict[str, Any]] = []
        clients: list[dict[str, Any]] = []
        descriptors: list[int] = []
        rest: list[bytes] = []
        for member in daemon.members.sockets.values():
            link = member.link
            if link not in engine.targets:
                continue
            facts: dict[str, Any] = {"replica_uuid": link.replica_uuid, "address": link.address}
            if isinstance(member, MemberSocket):
                assert member.socket is not None
                facts["hello"] = link.hello
                descriptors.append(member.socket.fileno())
            members.append({**facts, "errors": link.errors, "repaired": link.repaired_blocks})
        listening: list[Any] = [*daemon.servers]
        if daemon.control is not None:
            listening.append(daemon.control)
        descriptors += [each.socket.fileno() for each in listening]
        for connection in daemon.connections:
            assert connection.socket is not None
            facts = asdict(connection.parting())
            for name in ("unread", "unsent"):
                rest.append(facts[name])
                facts[name] = len(facts[name])
            clients.append(facts)
            descriptors.append(connection.socket.fileno())
        state = {
            "format": FORMAT,
            "volume_uuid": record.volume_uuid,
            "epoch": record.epoch,
            "version": record.version,
            "changes": daemon.ledger.count,
            "sequence": engine.sequence,
            "counters": {name: getattr(engine, name) for name in COUNTERS},
            "rebuild_bandwidth": daemon.members.bytes_per_second,
            "members": members,
            "listening": [each.asked for each in listening],
            "clients": clients,
            "devices": [device.snapshot for device in daemon.devices],  # they wait for a server
        }
        return state, descriptors, b"".join(rest)

    # ---- going on -------------------------------------------------------------------------

    def _fail(self, error: BlockdError) -> None:
        """Go on as if nothing had been asked."""
        daemon = self._daemon
        process.log(f"not handed over: {error}")
        daemon.handing_over = False
        if not daemon.members.open_local():
            return
        if self._paused_at:
            for server in daemon.servers:
                if not daemon.stopping:
                    server.go_on()
            for connection in tuple(daemon.connections):
                if not connection.negotiating:
                    connection.go_on_again()
            for device in daemon.devices:
                if not daemon.stopping:
                    device.go_on()
        assert self._end is not None
        self._end(error)
        daemon.send_everything()

    def _ended(self, error: BlockdError | None) -> None:
        assert error is not None  # there is no process left to say that it went well
        self._answer(error)


def _end_peer(channel: socket.socket) -> None:
    """End the connection and who is at its other end: it must let go of replicas and sockets."""
    try:
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, _, _ = struct.unpack("3i", credentials)
        if pid == os.getpid():
            return
        pidfd = os.pidfd_open(pid)
    except OSError:
        return
    finally:
        channel.close()
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(END_SECONDS_MAX * 1000):
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll.poll(KILLED_SECONDS_MAX * 1000)
    finally:
        os.close(pidfd)
