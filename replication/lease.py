"""Until when this volume daemon may answer reads: the read lease.

Writes need every member, so an owner that was replaced cannot answer any. Reads need one: cut off
from the authority and from the other members, it could go on reading old content from a member
that the new owner did not reach. Therefore data is asked for only while every member that the
record may call IN_SYNC has confirmed, within LEASE_SECONDS, that this session is still its newest.
An owner that could not fence all of them waits TAKEOVER_SECONDS before it serves (opening.py); it
has fenced at least one, and that one confirms nothing more.

Confirmations are pings; their age counts from when they were sent, by the clock of this process.
They are sent because of reads only: an idle volume sends none, and the first read after a pause
waits for one round trip. A single member needs no lease: a new owner must have fenced it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol import replica as wire
from replication.authority import IN_SYNC

if TYPE_CHECKING:
    from replication.engine import Engine
    from replication.link import Link, Reads

LEASE_SECONDS = 3.0  # above the limit for a silent member, which is OUT by then
RENEW_SECONDS = 1.0
TAKEOVER_SECONDS = LEASE_SECONDS * 1.1  # clocks may run at rates a little different
FOREVER = float("inf")


class Lease:
    """The lease of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.until = FOREVER  # reads need no look at the members before that
        self.renew_at = FOREVER
        self._waiting: list[Reads] = []
        self._pinged_at: dict[Link, float] = {}  # pings under way

    def _members(self) -> list[Link]:
        """Those that the record calls IN_SYNC, or may do so before we hear of it."""
        return [link for link in self._engine.targets if link.state == IN_SYNC or link.promoting]

    def members_changed(self) -> None:
        """Members came or went."""
        members = self._members()
        self._pinged_at = {link: at for link, at in self._pinged_at.items() if link in members}
        self._settle()

    def _settle(self) -> None:
        """What the confirmations of the members amount to."""
        members = self._members()
        if len(members) > 1:
            oldest = min(link.confirmed_at for link in members)
            self.until, self.renew_at = oldest + LEASE_SECONDS, oldest + RENEW_SECONDS
        else:
            self.until = self.renew_at = FOREVER
        if self._waiting and self._engine.now() >= self.until:
            if not self._pinged_at and all(link.connected for link in members):
                self.renew()  # what was confirmed is too old by now
        elif self._waiting:
            waiting, self._waiting = self._waiting, []
            for reads in waiting:
                self._engine.send_reads(reads)

    def wait(self, reads: Reads) -> None:
        """Send reads once the lease is renewed."""
        self._waiting.append(reads)
        self.renew()

    def fail_waiting(self) -> list[Reads]:
        """The volume has no copy left: nobody waits any more."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def renew(self) -> None:
        """Ask every member whether this session still counts."""
        now = self._engine.now()
        # Or when a confirmation comes; once the lease is over, every read has to look at it.
        self.renew_at = min(now + RENEW_SECONDS, self.until)
        for link in self._members():
            if link.connected and link not in self._pinged_at:
                self._pinged_at[link] = now
                self._engine.call(link, wire.PING, self._confirmed(link, now))

    def _confirmed(self, link: Link, sent_at: float) -> Callable[..., None]:
        def reply(argument: int, payload: object, error: object) -> None:
            self._pinged_at.pop(link, None)
            if error is None:
                link.confirmed_at = max(link.confirmed_at, sent_at)
                self._settle()

        return reply
