"""A volume daemon hands over to its successor: the production code but for the descriptors.

The sockets of the members change their process; everything else goes over as the bytes that real
processes send.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blockd.daemons.handover import COUNTERS, FORMAT, HandOver
from blockd.daemons.handshake import GivenSession
from blockd.daemons.volume import VolumeDaemon
from protocol.errors import StateError

if TYPE_CHECKING:
    from tests.sim.client import Client
    from tests.sim.cluster import VolumeProcess
    from tests.sim.network import VirtualSocket


class SimHandOver(HandOver):
    """One attempt; `fails`: the successor dies before it has taken everything."""

    def __init__(self, volume: VolumeProcess, client: Client, fails: bool) -> None:
        assert volume.daemon is not None
        self._volume = volume
        self._client = client
        self._fails = fails
        super().__init__(
            volume.daemon,
            {"formats": [FORMAT], "to": "0" * 32, "secret": "0" * 32},
            lambda error: None,
        )

    def _busy(self) -> str | None:
        mine = [each for each in self._client.under_way.values() if each.volume is self._volume]
        return super()._busy() or ("a request of the client" if mine else None)

    def _give(self) -> None:
        volume, network = self._volume, self._volume.cluster.network
        content, descriptors, _ = self._state()
        state = json.loads(json.dumps(content))
        if self._fails:
            self._fail(StateError("the successor is gone"))
            return
        sockets = [network.sockets[descriptor] for descriptor in descriptors]
        for sock in sockets:
            volume.process.at_death.remove(sock.close)
            sock.handler = None
        volume.cluster.hand_over(volume, state, sockets)


def take_over(
    volume: VolumeProcess, options: Any, state: dict[str, Any], sockets: list[VirtualSocket]
) -> VolumeDaemon:
    """The volume daemon of the successor."""
    authority = volume.cluster.authority
    record = authority.records[state["volume_uuid"]]
    assert (record.epoch, record.version) == (state["epoch"], state["version"])
    sessions = {}
    for member, sock in zip(state["members"], sockets, strict=True):
        sock.process = volume.process
        volume.process.at_death.append(sock.close)
        sessions[member["replica_uuid"]] = GivenSession(member["address"], member["hello"], sock)  # type: ignore[arg-type]
    daemon = VolumeDaemon(
        volume.loop,  # type: ignore[arg-type]
        authority,
        record,
        sessions,
        options,
        int(state["sequence"]),
    )
    daemon.ledger.count = int(state["changes"])
    for name in COUNTERS:
        setattr(daemon.engine, name, state["counters"][name])
    return daemon
