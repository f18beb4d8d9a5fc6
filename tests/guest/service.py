"""A node service in a guest, used through its command line."""

from __future__ import annotations

import json
from typing import Any

from tests.guest.machine import Guest

START_SECONDS = 120  # it imports for seconds there: the machine is emulated
STOP_SECONDS = 60
COMMAND_SECONDS = 120.0


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
                [ ! -S {self.home}/blockd.sock ] || exit 0
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
