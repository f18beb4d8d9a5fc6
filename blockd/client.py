"""The client of the node service's API, used by the command line.

It speaks HTTP over the unix socket `HOME/blockd.sock`, or to a URL with a bearer token. Answers are
the JSON objects of the API as plain dictionaries. An error answer `{"code", "message", "retry"}`
is raised as the error family of that code (protocol/errors.py), so a caller sees the same
exception it would have seen inside the node service.

Every call ends: a connection must be made within CONNECT_SECONDS, and the answer to a call that
waits for a state must come at most ANSWER_SECONDS after that wait ran out in the node service.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from protocol.errors import (
    BlockdError,
    DeadlineError,
    NotFoundError,
    PeerError,
    RequestError,
    StateError,
    from_code,
)
from protocol.units import check_name

Json = dict[str, Any]

SOCKET_NAME = "blockd.sock"
TOKEN_NAME = "token"  # file of this name in HOME, written by the node service
SOCKET_PATH_BYTES_MAX = 107  # sun_path is 108 bytes with its final zero
CONNECT_SECONDS = 5.0  # the node service is on this machine or one network hop away
ANSWER_SECONDS = 30.0  # the slowest answer that waits for nothing: a status of every daemon
WAIT_SECONDS = 60.0  # how long a call waits for the wanted state unless told otherwise
WAIT_SECONDS_MAX = 3600.0  # the longest wait the API accepts


class Client:
    """One connection pool to one node service; use it as a context manager."""

    def __init__(self, http: httpx.Client, place: str, *, directory: int | None = None) -> None:
        self._http = http
        self._directory = directory
        self.place = place  # what error messages call the node service's address

    @classmethod
    def over_unix(cls, home: Path) -> Client:
        """A client of the node service whose state is in `home`."""
        path = home.absolute() / SOCKET_NAME
        connect_path = str(path)
        directory: int | None = None
        if len(os.fsencode(connect_path)) > SOCKET_PATH_BYTES_MAX and path.parent.is_dir():
            # An address through the open directory is short whatever the length of the path.
            directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            connect_path = f"/proc/self/fd/{directory}/{SOCKET_NAME}"
        transport = httpx.HTTPTransport(uds=connect_path)
        http = httpx.Client(transport=transport, base_url="http://blockd", trust_env=False)
        return cls(http, str(path), directory=directory)

    @classmethod
    def over_tcp(cls, url: str, token: str) -> Client:
        """A client of the node service at `url`, which asks for `token`."""
        try:
            parsed = httpx.URL(url if "://" in url else f"http://{url}")
        except httpx.InvalidURL as error:
            raise RequestError(
                f"address {url!r} is not a URL ({error}); example: http://127.0.0.1:9500"
            ) from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise RequestError(
                f"address {url!r} is not a http or https URL; example: http://127.0.0.1:9500"
            )
        headers = {"Authorization": f"Bearer {token}"}
        # trust_env: a proxy meant for the web has no business between us and the node service.
        return cls(httpx.Client(base_url=parsed, headers=headers, trust_env=False), str(parsed))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    # -- node ---------------------------------------------------------------------------------

    def status(self) -> Json:
        """The state of the node service and a line about every volume."""
        return _object(self._call("GET", "/v1/status"))

    # -- volumes ------------------------------------------------------------------------------

    def volumes(self) -> list[Json]:
        """All volumes."""
        return _list(self._call("GET", "/v1/volumes"))

    def volume(self, name: str) -> Json:
        """One volume with its replicas and snapshots."""
        return _object(self._call("GET", _volume_path(name)))

    def volume_create(self, body: Mapping[str, Any], *, wait: float = WAIT_SECONDS) -> Json:
        """Create a volume; `body` holds name, size_bytes and what differs from the defaults."""
        return _object(self._call("POST", "/v1/volumes", body=body, wait=wait))

    def volume_delete(self, name: str, *, force: bool = False, wait: float = WAIT_SECONDS) -> Json:
        """Delete a volume with its replicas and snapshots."""
        query = {"force": "true"} if force else {}
        return _object(self._call("DELETE", _volume_path(name), query=query, wait=wait))

    def volume_change(self, name: str, changes: Json) -> Json:
        """Change how the replicas of a volume are kept."""
        return _object(self._call("PATCH", f"{_volume_path(name)}/settings", body=changes))

    def resize(self, name: str, size_bytes: int, *, wait: float = WAIT_SECONDS) -> Json:
        """Make a volume larger."""
        return self._volume_post(name, "resize", {"size_bytes": size_bytes}, wait)

    def upgrade(self, name: str, program: str | None, *, wait: float = WAIT_SECONDS) -> Json:
        """Replace the daemons of a volume while it is in use."""
        body = {} if program is None else {"program": program}
        return self._volume_post(name, "upgrade", body, wait)

    def attach(self, name: str, frontend: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Attach a volume through a front end."""
        return self._volume_post(name, "attach", {"frontend": frontend}, wait)

    def detach(self, name: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Detach a volume."""
        return self._volume_post(name, "detach", {}, wait)

    def mount(self, name: str, path: str | None, fs: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Mount an attached volume; it gets a file system if it is blank."""
        return self._volume_post(name, "mount", {"path": path, "fs": fs}, wait)

    def umount(self, name: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Unmount a volume."""
        return self._volume_post(name, "umount", {}, wait)

    # -- snapshots ----------------------------------------------------------------------------

    def snapshots(self, volume: str) -> list[Json]:
        """The snapshots of a volume, oldest first."""
        return _list(self._call("GET", f"{_volume_path(volume)}/snapshots"))

    def usage(self, volume: str, *, wait: float = WAIT_SECONDS) -> Json:
        """How much data the volume and its snapshots show and hold."""
        return _object(self._call("GET", f"{_volume_path(volume)}/usage", wait=wait))

    def snapshot(self, volume: str, name: str) -> Json:
        """One snapshot."""
        return _object(self._call("GET", _snapshot_path(volume, name)))

    def snapshot_create(
        self,
        volume: str,
        name: str,
        labels: Mapping[str, str],
        *,
        freeze: bool = False,
        wait: float = WAIT_SECONDS,
    ) -> Json:
        """Take a snapshot; it is durable when this returns."""
        body: Json = {"name": check_name("snapshot", name), "labels": dict(labels)}
        body |= {"freeze": True} if freeze else {}
        path = f"{_volume_path(volume)}/snapshots"
        return _object(self._call("POST", path, body=body, wait=wait))

    def snapshot_delete(self, volume: str, name: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Delete a snapshot."""
        return _object(self._call("DELETE", _snapshot_path(volume, name), wait=wait))

    def snapshot_revert(
        self, volume: str, name: str, *, force: bool = False, wait: float = WAIT_SECONDS
    ) -> Json:
        """Make the volume's content that of a snapshot again."""
        path = f"{_snapshot_path(volume, name)}/revert"
        return _object(self._call("POST", path, body={"force": force}, wait=wait))

    def snapshot_attach(
        self, volume: str, name: str, frontend: str, *, wait: float = WAIT_SECONDS
    ) -> Json:
        """Give a snapshot a read-only device or NBD address of its own."""
        path = f"{_snapshot_path(volume, name)}/attach"
        return _object(self._call("POST", path, body={"frontend": frontend}, wait=wait))

    def snapshot_detach(self, volume: str, name: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Take a snapshot's device down."""
        path = f"{_snapshot_path(volume, name)}/detach"
        return _object(self._call("POST", path, body={}, wait=wait))

    def snapshot_clone(
        self, volume: str, name: str, body: Mapping[str, Any], *, wait: float = WAIT_SECONDS
    ) -> Json:
        """Make a new volume, described by `body`, with the content of a snapshot."""
        path = f"{_snapshot_path(volume, name)}/clone"
        return _object(self._call("POST", path, body=body, wait=wait))

    def snapshot_diff(self, volume: str, base: str, to: str) -> Iterator[list[int]]:
        """[offset, length] of the extents in which snapshot `to` (empty: the volume) may differ."""
        path = f"{_volume_path(volume)}/snapshots/{check_name('snapshot', base)}/diff"
        offset: int | None = 0
        while offset is not None:
            found = _object(self._call("GET", path, query={"to": to, "offset": str(offset)}))
            yield from found["extents"]
            offset = found["next"]

    # -- replicas -----------------------------------------------------------------------------

    def replicas(self, volume: str) -> list[Json]:
        """The replicas of a volume."""
        return _list(self._call("GET", f"{_volume_path(volume)}/replicas"))

    def replica_add(self, volume: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Add one replica; it is filled while the volume is in use."""
        return self._volume_post(volume, "replicas", {}, wait)

    def replica_delete(self, volume: str, replica: str, *, wait: float = WAIT_SECONDS) -> Json:
        """Remove one replica and its data."""
        path = f"{_volume_path(volume)}/replicas/{check_name('replica', replica)}"
        return _object(self._call("DELETE", path, wait=wait))

    def rebuild(
        self, volume: str, replica: str | None = None, *, wait: float = WAIT_SECONDS
    ) -> Json:
        """Start the rebuild of one replica, or of every one that is OUT."""
        body = {} if replica is None else {"replica": replica}
        return self._volume_post(volume, "rebuild", body, wait)

    def verify(self, name: str) -> Json:
        """Begin to verify a volume; the volume shows how far it is."""
        return self._volume_post(name, "verify", {}, WAIT_SECONDS)

    # -- the one door -------------------------------------------------------------------------

    def _volume_post(self, name: str, verb: str, body: Mapping[str, Any], wait: float) -> Json:
        return _object(self._call("POST", f"{_volume_path(name)}/{verb}", body=body, wait=wait))

    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        wait: float | None = None,
    ) -> Any:
        """Send one request; return the decoded answer or raise its error family."""
        parameters = dict(query or {})
        if wait is not None:
            parameters["wait"] = f"{wait:g}"
        timeout = httpx.Timeout(ANSWER_SECONDS + (wait or 0.0), connect=CONNECT_SECONDS)
        with self._transport_errors(method, path):
            response = self._http.request(
                method,
                path,
                json=None if body is None else dict(body),
                params=parameters,
                timeout=timeout,
            )
        if response.is_success:
            return _decoded(response, self.place)
        raise _error_of(response, self.place)

    @contextmanager
    def _transport_errors(self, method: str, path: str) -> Iterator[None]:
        """Turn what the HTTP library raises into the error families."""
        try:
            yield
        except httpx.ConnectTimeout:
            raise DeadlineError(
                f"node service at {self.place} did not accept a connection within "
                f"{CONNECT_SECONDS:g} s; check the address and the machine's load"
            ) from None
        except httpx.ConnectError as error:
            if "ermission" in str(error):
                raise BlockdError(
                    f"no permission to use the node service at {self.place}; "
                    "run this as the user who started it"
                ) from None
            raise StateError(
                f"node service is not running at {self.place}; start it with `blockd serve`"
            ) from None
        except httpx.TimeoutException:
            raise DeadlineError(
                f"node service at {self.place} did not answer {method} {path} in time; "
                "it may still be done: look with `blockd status`"
            ) from None
        except httpx.HTTPError as error:
            raise PeerError(
                f"node service at {self.place} broke off {method} {path} ({error}); "
                "it may still be done: look with `blockd status`"
            ) from None


def _volume_path(name: str) -> str:
    return f"/v1/volumes/{check_name('volume', name)}"


def _snapshot_path(volume: str, name: str) -> str:
    return f"{_volume_path(volume)}/snapshots/{check_name('snapshot', name)}"


def _decoded(response: httpx.Response, place: str) -> Any:
    if not response.content:
        return {}
    try:
        return response.json()
    except ValueError:
        raise PeerError(
            f"{place} answered with something that is not JSON; is it the node service?"
        ) from None


def _object(value: Any) -> Json:
    """The answer as an object; an empty answer is an empty object."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PeerError(
            f"the node service answered with a {type(value).__name__} where an object belongs; "
            "is it of another version?"
        )
    return value


def _list(value: Any) -> list[Json]:
    if not isinstance(value, list):
        raise PeerError(
            f"the node service answered with a {type(value).__name__} where a list belongs; "
            "is it of another version?"
        )
    return value


def _error_of(response: httpx.Response, place: str) -> BlockdError:
    """The error an answer describes; prose from something else is told as a peer's error."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if isinstance(body, dict) and isinstance(body.get("code"), str):
        return from_code(body["code"], str(body.get("message") or body["code"]))
    if response.status_code == NotFoundError.http_status:
        return PeerError(
            f"{place} does not know {response.request.url.path}; is it of another version?"
        )
    return PeerError(
        f"{place} answered {response.status_code} {response.reason_phrase}; is it the node service?"
    )
