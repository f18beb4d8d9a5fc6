"""A node service in a guest, used through its command line."""

from __future__ import annotations

import json
import time
from typing import Any

from tests.guest.machine import Guest, GuestError

START_SECONDS = 120  # it imports for seconds there: the machine is emulated
STOP_SECONDS = 60
COMMAND_SECONDS = 120.0
SETTLE_SECONDS = 180.0
POLL_SECONDS = 0.5


class Service:
    """`blockd serve` with its home at `home`; daemons and volumes live below it."""

    def __init__(self, guest: Guest, home: str) -> None:
        self.guest = guest
        self.home = home
        self.start()

    def start(self) -> None:
        """Start it, and wait for its socket."""
        self.guest.shell(
            f"""mkdir -p {self.home}
            python3 -m blockd --home {self.home} serve >{self.home}/serve.log 2>&1 &
            echo $! >{self.home}/serve.test.pid
            for i in $(seq {START_SECONDS * 10}); do
                # One that a power cut has left there is older.
                [ ! {self.home}/blockd.sock -nt {self.home}/serve.test.pid ] || exit 0
                kill -0 $! || break
                sleep 0.1
            done
            cat {self.home}/serve.log
            exit 1""",
            timeout_seconds=START_SECONDS + 10.0,
        )

    def blockd(self, *words: str) -> Any:
        """`blockd WORDS -o json`, parsed. Raises GuestError if it fails."""
        words = ("--home", self.home, *words, "-o", "json")
        said = self.guest.blockd(*words, timeout_seconds=COMMAND_SECONDS).out
        return json.loads(said) if said.strip() else None

    def until(self, name: str, *, timeout_seconds: float = SETTLE_SECONDS, **wanted: Any) -> Any:
        """Wait until the volume's view has the wanted values; the view. Raises GuestError."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            view = self.blockd("volume", "show", name)
            if all(view[key] == value for key, value in wanted.items()):
                return view
            if time.monotonic() > deadline:
                log = self.guest.shell(f"tail -n 50 {self.home}/serve.log")
                raise GuestError(
                    f"volume {name} is not {wanted} after {timeout_seconds:g} s: {view}\n{log}"
                )
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the node service; its volumes go on. Detach them before, or they stay."""
        self.guest.shell(
            f"""pid=$(cat {self.home}/serve.test.pid)
            kill $pid
            for i in $(seq {STOP_SECONDS * 10}); do
                kill -0 $pid 2>/dev/null || exit 0
                sleep 0.1
            done
            exit 1""",
            timeout_seconds=STOP_SECONDS + 10.0,
        )
