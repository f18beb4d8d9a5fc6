"""The error families every part shares, sorted by who must act.

`RequestError`: the caller. `PeerError`: another node or process. `StorageError`: our own disk.
`StateError`: nobody is wrong, but not now. Each class carries what every door needs: an `errno`
for the block protocols, an `exit_code` for the command line, an `http_status` for the API,
`retry` (is the same call worth repeating?) and a `code`, the stable word that crosses the wire in
place of prose. Any other exception that escapes is a bug.

Every message names the thing, the value, the limit and the next step.
"""

from __future__ import annotations

import errno as errno_module


class BlockdError(Exception):
    """The root of the families; never raised itself."""

    code = "failed"
    errno = errno_module.EIO
    exit_code = 1
    http_status = 500
    retry = False

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        if errno is not None:
            self.errno = errno


class RequestError(BlockdError):
    """The caller asked for something that can never work as asked."""

    code = "bad_request"
    errno = errno_module.EINVAL
    exit_code = 2
    http_status = 400


class NotFoundError(RequestError):
    """The named thing does not exist."""

    code = "not_found"
    errno = errno_module.ENOENT
    exit_code = 3
    http_status = 404


class PeerError(BlockdError):
    """Another process or node broke the protocol, refused us or went away."""

    code = "peer"
    errno = errno_module.EIO
    http_status = 502
    retry = True


class StorageError(BlockdError):
    """Our own disk or directory cannot be used or returned bad data."""

    code = "storage"
    errno = errno_module.EIO
    http_status = 507


class StateError(BlockdError):
    """The request is fine, the moment is not."""

    code = "state"
    errno = errno_module.EBUSY
    http_status = 409
    retry = True


class ConflictError(StateError):
    """The thing exists already, is in use, or was changed by someone else in between."""

    code = "conflict"
    errno = errno_module.EEXIST
    exit_code = 4
    retry = False


class DeadlineError(StateError):
    """The wait ran out before the state was reached."""

    code = "timeout"
    errno = errno_module.ETIMEDOUT
    exit_code = 5
    http_status = 504


class DegradedError(StateError):
    """It was done, or refused, because fewer replicas than wanted are in sync."""

    code = "degraded"
    exit_code = 6


class LostWritesError(DegradedError):
    """What can be reached may lack writes that a user who is still there believes in."""

    code = "lost_writes"
    exit_code = 7


FAMILIES: dict[str, type[BlockdError]] = {
    family.code: family
    for family in (
        BlockdError,
        RequestError,
        NotFoundError,
        PeerError,
        StorageError,
        StateError,
        ConflictError,
        DeadlineError,
        DegradedError,
        LostWritesError,
    )
}


def from_code(code: str, message: str) -> BlockdError:
    """The error a peer described with `code`; an unknown code is a plain failure."""
    return FAMILIES.get(code, BlockdError)(message)
