"""Members take turns while the client empties what it leaves.

The client leaves a zone, which becomes clean. One member goes away; meanwhile the client zeroes all
it had in that zone, and a second member gets an empty disk and is rebuilt. When the first one comes
back, the third goes: what the first one lacks can be learned only from the second, which never had
it. Every step is skipped if the rest of the trouble makes it one that no system survives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protocol.units import BLOCK_BYTES

if TYPE_CHECKING:
    from tests.sim.client import Client
    from tests.sim.cluster import Member
    from tests.sim.faults import Faults

CLEAN_SECONDS = 4.0  # from the last write to a clean zone
EMPTY_SECONDS = CLEAN_SECONDS + 3.0  # the member is OUT by then
REPLACE_SECONDS = EMPTY_SECONDS + 1.0
RETURN_SECONDS = REPLACE_SECONDS + 8.0
THIRD_AWAY_SECONDS = 15.0


class Turnover:
    """One of them; begins at once."""

    def __init__(self, faults: Faults, members: list[Member], ground: list[int]) -> None:
        self._faults = faults
        self._first, self._second, self._third = members
        self._ground = ground
        client, now = faults.client, faults.kernel.now
        client.grounds = [each for each in client.grounds if each is not ground]
        client.ground = client.grounds[0]
        faults.lasts_until = now + RETURN_SECONDS + THIRD_AWAY_SECONDS
        faults.mild_until = now + RETURN_SECONDS
        for seconds, step in (
            (CLEAN_SECONDS, self._go_away),
            (EMPTY_SECONDS, self._empty),
            (REPLACE_SECONDS, self._replace),
            (RETURN_SECONDS - 0.01, self._turn),
        ):
            faults.after(seconds, step)

    def _go_away(self) -> None:
        self._first.cut_power(1.0, 0.0, RETURN_SECONDS - CLEAN_SECONDS)

    def _empty(self) -> None:
        client, cluster = self._faults.client, self._faults.cluster
        volume = next((volume for volume in cluster.volumes if volume.usable), None)
        if volume is not None:
            used, where = volume, client.reach(self._ground)
            cluster.kernel.at(0.0, used.process, lambda: client.zero(used, *where))

    def _replace(self) -> None:
        self._faults.replace_disk(self._second)

    def _turn(self) -> None:
        if self._second in self._faults.cluster.in_sync():
            self._third.cut_power(1.0, 0.0, THIRD_AWAY_SECONDS)


def fit_to_leave(client: Client) -> list[list[int]]:
    """The grounds on which something was written, while there is another one to go to."""
    if len(client.grounds) < 2:
        return []
    return [ground for ground in client.grounds if any(_holds_data(client, b) for b in ground)]


def _holds_data(client: Client, block: int) -> bool:
    places = client.places(block * BLOCK_BYTES, BLOCK_BYTES)
    written = [op for place, _, _ in places for op in client.registers[place].writes]
    return bool(written) and written[-1].value != 0
