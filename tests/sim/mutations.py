"""Deliberate mistakes in the production code, at least one per replication rule.

A mutation replaces text of a module while it is imported; it aborts if the text is not there, so
that a change of the code cannot make a mutation empty. This module imports no production code.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType


@dataclass(frozen=True)
class Mutation:
    """`rule` is the number of the replication rule that it breaks (ARCHITECTURE.md)."""

    name: str
    rule: int
    module: str
    old: str
    new: str
    more: tuple[tuple[str, str], ...] = ()  # further replacements in the same module
    also: tuple[tuple[str, str, str], ...] = ()  # in other modules: module, old, new

    def replacements(self, module: str) -> list[tuple[str, str]]:
        """What is to be replaced in the text of a module."""
        found = [(self.old, self.new), *self.more] if module == self.module else []
        return found + [(old, new) for name, old, new in self.also if name == module]


MUTATIONS = (
    Mutation(
        "older sessions stay after a fence",
        1,
        "blockd.daemons.replica",
        "if other is not session and other.fenced:",
        "if False:",
    ),
    Mutation(
        "members not known to be equal stay in sync at open",
        1,
        "blockd.daemons.opening",
        "record = record.with_state(replica_uuid, OUT)",
        "pass",
    ),
    Mutation(
        "acknowledge after the first member",
        2,
        "replication.engine",
        "min([link.applied for link in self.targets])",
        "max([link.applied for link in self.targets])",
    ),
    Mutation(
        "acknowledge before OUT is recorded",
        3,
        "replication.membership",
        "    engine.ledger.change(change, done)\n\n\ndef tell_config",
        "    leave()\n    engine.ledger.change(change, done)\n\n\ndef tell_config",
    ),
    Mutation(
        "skip the compare-and-swap of OUT",
        3,
        "replication.membership",
        "    engine.ledger.change(change, done)\n\n\ndef tell_config",
        "    link.leaving, link.state = False, OUT\n    leave()\n\n\ndef tell_config",
    ),
    Mutation(
        "the last member in sync is put OUT",
        3,
        "replication.membership",
        "if not others:",
        "if False:",
        (("elif link.state == IN_SYNC and not _others_in_sync(engine, link):", "elif False:"),),
    ),
    Mutation(
        "fewer members than min-in-sync are enough",
        3,
        "replication.engine",
        "self.suspended = 0 < in_sync < self.record.min_in_sync",
        "self.suspended = False",
    ),
    Mutation(
        "no read lease",
        4,
        "replication.lease",
        "self.until, self.renew_at = oldest + LEASE_SECONDS, oldest + RENEW_SECONDS",
        "self.until = self.renew_at = FOREVER",
    ),
    Mutation(
        "a new owner does not wait for the lease",
        4,
        "blockd.daemons.opening",
        "wanted.loop.sleep(TAKEOVER_SECONDS)",
        "pass",
    ),
    Mutation(
        "trust a failed fsync",
        5,
        "replication.engine",
        "        if error is not None:\n            # Never retried",
        "        if False:\n            # Never retried",
    ),
    Mutation(
        "flush one member only",
        5,
        "replication.engine",
        "_Flush(set(self.targets), done",
        "_Flush(set(self.targets[:1]), done",
    ),
    Mutation(
        "a flush is not covered by fdatasync",
        5,
        "snapshots.flush",
        "                os.fdatasync(layer.fd)",
        "                pass",
    ),
    Mutation(
        "a member after a reboot counts as whole",
        6,
        "blockd.daemons.replica_service",
        "return self.replica.metadata.fenced_boot == self._boot_id",
        "return True",
    ),
    Mutation(
        "the last member comes back after a reboot",
        6,
        "blockd.daemons.members",
        "member.state == IN_SYNC and boot_id != self._boot_ids.get(replica_uuid)",
        "False",
    ),
    Mutation(
        "no dirty log",
        7,
        "snapshots.dirty",
        "        if clean:\n            for zone in clean:",
        "        if False:\n            for zone in clean:",
    ),
    Mutation(
        "no recovery after a crash",
        7,
        "snapshots.replica",
        "if not metadata.clean:",
        "if False:",
    ),
    Mutation(
        "zones count as the same everywhere after a flush here",
        7,
        "snapshots.store",
        "(at <= stable or not self.shared)",
        "True",
    ),
    Mutation(
        "members count as equal after a crash",
        7,
        "replication.choosing",
        "    if was_clean:",
        "    if was_clean or not consumer_alive:",
    ),
    Mutation(
        "members that are behind are not caught up",
        7,
        "replication.choosing",
        "            behind[uuid] = ranges",
        "            equal.append(uuid)",
    ),
    Mutation(
        "no range lock for rebuild copies, and no verification, which finds what that does",
        8,
        "replication.copyjobs",
        "if self._layer_id == plan.head_id:",
        "if False:",
        also=(("replication.rebuild", "if digests[0] != digests[1]:", "if False:"),),
    ),
    Mutation(
        "writes do not wait for locked ranges",
        8,
        "replication.engine",
        "data, fua)\n        elif self.locks.held and self.locks.blocks(",
        "data, fua)\n        elif False and self.locks.blocks(",
    ),
    Mutation(
        "a snapshot is recorded before it is durable",
        9,
        "replication.structure",
        "            else:\n                engine.flush_then(flushed)\n\n        content",
        "            else:\n                flushed(None)\n\n        content",
    ),
    Mutation(
        "a seal misses one member",
        9,
        "replication.structure",
        "    for link in targets:\n        ask(link)\n",
        "    for link in targets[:-1]:\n        ask(link)\n    if targets[1:]:\n"
        "        answered(targets[-1], None)\n    else:\n        ask(targets[0])\n",
    ),
    Mutation(
        "a sealed but unrecorded snapshot is not adopted",
        9,
        "replication.structure",
        "    if head_id == record.head_id:\n        return record",
        "    return record",
    ),
    Mutation(
        "layers that a clone has, too, are emptied by folding",
        9,
        "snapshots.fold",
        "if self._keep or not mask:",
        "if not mask:",
        more=(("if self._keep and not store.metadata.unshare:", "if False:"),),
    ),
    Mutation(
        "promote before copying and verifying",
        10,
        "replication.rebuild",
        "lambda: self._copy(attempt), failed)",
        "lambda: self._take_stamps(attempt, source, 0), failed)",
    ),
    Mutation(
        "a rebuild ignores the member's own dirty zones",
        10,
        "replication.rebuild",
        '            plan.add_zones(answer["zones"])\n            plan.all_zones_of',
        "            plan.all_zones_of",
    ),
    Mutation(
        "a rebuild ignores what changed on the source",
        10,
        "replication.rebuild",
        '                plan.add_zones(answer["zones"])\n                plan.ask_regions',
        "                plan.ask_regions",
    ),
    Mutation(
        "a rebuilt member forgets when zones were changed",
        10,
        "snapshots.dirty",
        "        for zone in raised:\n",
        "        for zone in ():\n",
    ),
    Mutation(
        "writes during a rebuild do not reach the member",
        10,
        "replication.membership",
        "    engine.set_members([*engine.targets, link], engine.readers)",
        "    pass",
    ),
    Mutation(
        "an older record than the data is accepted",
        11,
        "blockd.daemons.opening",
        'if hello["config_seq"] > record.config_seq or hello["promised_epoch"] > record.epoch:',
        "if False:",
    ),
    Mutation(
        "a write that found no space is acknowledged",
        12,
        "blockd.daemons.replica_changes",
        "                self._first_parked(sequence, error)\n            else:\n"
        "                if self._epoch != self._service.epoch:\n"
        "                    self._begin_epoch(sequence)\n"
        "                self.recent.append((sequence, first, count))\n"
        "                return True\n        kept",
        "            return True\n        kept",
    ),
    Mutation(
        "what waits for space is forgotten",
        12,
        "blockd.daemons.replica_changes",
        "        self.retry()\n        if self.parked:",
        "        if self.parked:",
    ),
    Mutation(
        "no checksum is looked at",
        13,
        "replication.answers",
        "if block_checksum(block) != entries[index]:",
        "if False:",
    ),
    Mutation(
        "no other member is read after a bad checksum",
        13,
        "replication.reading",
        "        self.send_reads(reads)\n\n    def set_readers",
        "        for cookie in reads.cookies:\n"
        "            reads.client.done(cookie, errno.EIO)\n\n    def set_readers",
    ),
)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles another text than the file's."""

    mutation: Mutation

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        text = self.get_data(path).decode()
        mutation = self.mutation
        for old, new in mutation.replacements(fullname):
            count = text.count(old)
            if count != 1:
                raise SystemExit(f"mutation {mutation.name!r}: {old!r} is {count} times in {path}")
            text = text.replace(old, new)
        return compile(text, path, "exec")


class _Finder:
    """Finds one module, mutated."""

    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._mutation.replacements(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        loader = _Loader(fullname, spec.origin)
        loader.mutation = self._mutation
        spec.loader = loader
        return spec


def install(mutation: Mutation) -> None:
    """Before its module is imported: import it with the mistake."""
    assert mutation.module not in sys.modules, f"{mutation.module} is imported already"
    sys.meta_path.insert(0, _Finder(mutation))
