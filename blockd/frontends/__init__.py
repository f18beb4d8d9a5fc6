"""The front ends there are, and which one `auto` chooses."""

from __future__ import annotations

from blockd.frontends.base import FrontEnd
from blockd.frontends.fuse import FuseFrontEnd
from blockd.frontends.nbd import NbdFrontEnd
from blockd.frontends.nbd_tool import NbdToolFrontEnd
from blockd.frontends.socket import SocketFrontEnd
from blockd.frontends.ublk import UblkFrontEnd
from protocol.errors import RequestError, StateError

# In the order `auto` tries them: a device is preferred to a bare socket.
FRONT_ENDS: dict[str, FrontEnd] = {
    front_end.name: front_end
    for front_end in (
        NbdFrontEnd(),
        UblkFrontEnd(),
        NbdToolFrontEnd(),
        FuseFrontEnd(),
        SocketFrontEnd(),
    )
}


class FrontEndError(StateError):
    """The front end cannot be used on this machine as it is."""

    retry = False


def availability() -> dict[str, str | None]:
    """Every front end with why it cannot be used here, None if it can."""
    return {name: front_end.unavailable() for name, front_end in FRONT_ENDS.items()}


def check(name: str) -> str:
    """Return `name` if it is `auto` or a front end, else raise RequestError."""
    if name == "auto" or name in FRONT_ENDS:
        return name
    raise RequestError(f"front end {name!r} does not exist; choose auto, {', '.join(FRONT_ENDS)}")


def choose(name: str) -> FrontEnd:
    """The front end of that name; for `auto` the first that works here."""
    if name == "auto":
        return next(f for f in FRONT_ENDS.values() if f.unavailable() is None)
    front_end = FRONT_ENDS[check(name)]
    reason = front_end.unavailable()
    if reason is not None:
        raise FrontEndError(f"front end {name} cannot be used here: {reason}")
    return front_end
