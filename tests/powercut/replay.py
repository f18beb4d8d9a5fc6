"""One history is recorded; then power is cut at every boundary, in many ways, and all is opened."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time as clock
from collections.abc import Iterator
from pathlib import Path
from random import Random

from protocol.errors import BlockdError
from tests.powercut.check import Violation, check, check_rebuild
from tests.powercut.history import History
from tests.powercut.rebuild import RebuildHistory
from tests.powercut.states import (
    EVERYTHING,
    NOTHING,
    Choice,
    after_cut,
    make,
    one_kind,
    random_choice,
)

LIFE_STEPS = 120  # of a history of the kind "life"; a rebuild is as long as it is
FILES_MAX = 3  # of which alone, or of all but which, is kept, at each boundary
VIOLATIONS_MAX = 5  # told per history; one cause has many
BOOT = 1000  # boots of checks; those of histories are far below


class Replay:
    """`kind` is "life" (history.py) or "rebuild" (rebuild.py)."""

    def __init__(
        self,
        kind: str,
        seed: int,
        states: int,
        *,
        prefixes: bool,
        steps: int = LIFE_STEPS,
        lying: str = "",
    ) -> None:
        self.kind = kind
        self.seed = seed
        self.boundaries = self.opened = self.events = 0
        self.seconds = 0.0
        self.violations: list[str] = []
        self._states = states
        self._prefixes = prefixes
        self._steps = steps
        self._lying = lying  # syncs of this file do nothing, to see that it is noticed
        self._random = Random(f"{kind} {seed}")

    def line(self) -> str:
        """What was done."""
        result = f"{len(self.violations)} VIOLATIONS" if self.violations else "all right"
        return (
            f"{self.kind} seed {self.seed}: {self.events} events, {self.boundaries} sync "
            f"boundaries, {self.opened} states opened, {self.seconds:.0f} s: {result}"
        )

    def run(self) -> None:
        """Record, cut, open, check."""
        began = clock.monotonic()
        memory = Path("/dev/shm")
        directory = Path(
            tempfile.mkdtemp(prefix="powercut-", dir=memory if memory.is_dir() else None)
        )
        try:
            self._run(directory)
        finally:
            gc.unfreeze()
            shutil.rmtree(directory)
            self.seconds = clock.monotonic() - began

    def _run(self, directory: Path) -> None:
        history = (History if self.kind == "life" else RebuildHistory)(directory, self._random)
        history.recorder.lying = self._lying
        try:
            with history.running():
                history.run(self._steps)
        except (BlockdError, AssertionError) as error:
            done = ", ".join(name for _, name in history.steps[-4:])
            self.violations.append(f"in the history, after {done}: {error!r}")
            return
        first = history.lost if isinstance(history, RebuildHistory) else 0
        recorder = history.recorder
        self.events = recorder.time
        boundaries = [(at, what) for at, what in recorder.boundaries if at >= first]
        self.boundaries = len(boundaries)
        gc.freeze()  # `kill` collects garbage: what was recorded need not be looked at each time
        previous = first
        for at, what in boundaries:
            for time, choice in self._cuts(history, previous, at):
                self._cut(history, str(directory / "cut"), time, what, choice)
                if len(self.violations) >= VIOLATIONS_MAX:
                    return
            previous = at

    def _cuts(self, history: History, previous: int, at: int) -> Iterator[tuple[int, Choice]]:
        """Just before something became durable, just after, and everywhere since the last."""
        recorder, random = history.recorder, self._random
        begin = recorder.segment_at(at).begin
        before = max(at - 1, begin)
        if self._prefixes:
            for time in range(max(previous + 1, begin), at):
                yield time, EVERYTHING
            inodes = range(len(recorder.segment_at(at).inodes))
            for number in random.sample(inodes, min(len(inodes), FILES_MAX)):
                for kept in (False, True):
                    choice = one_kind(number, kept=kept, recorder=recorder, time=before)
                    yield before, choice
        yield before, NOTHING
        yield at, NOTHING
        for _ in range(self._states):
            yield random.choice((before, before, at)), random_choice(random)

    def _cut(self, history: History, path: str, time: int, what: str, choice: Choice) -> None:
        state = after_cut(history.recorder, time, choice)
        make(state, history.path, path)
        self.opened += 1
        try:
            if isinstance(history, RebuildHistory):
                check_rebuild(path, history, time, BOOT)
            else:
                check(path, history.expected, time, BOOT)
        except Violation as error:
            steps = [name for begin, name in history.steps if begin <= time][-4:]
            self.violations.append(
                f"power cut at {time} (next: {what}; last steps: {', '.join(steps)}): {error}"
            )
