"""The REST API: Litestar handlers over the operations, with OpenAPI at /schema.

Every handler runs in a thread and may wait (`?wait=SECONDS`, 0 to return at once). Errors are
`{"code", "message", "retry"}` with the HTTP status of their family; an unexpected error is logged
and answered without its details. Bodies are msgspec types that refuse unknown fields.

The application on TCP asks for the bearer token on every path; the one on the unix socket trusts
the file's mode 0600.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from litestar import Litestar, Request, Response, delete, get, post
from litestar.connection import ASGIConnection
from litestar.exceptions import (
    HTTPException,
    MethodNotAllowedException,
    NotAuthorizedException,
    NotFoundException,
    ValidationException,
)
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.params import Parameter

from blockd import __version__
from blockd.frontends import availability
from blockd.node.context import Context, log
from blockd.node.objects import REBUILD_WAIT_SECONDS, Disk, Node, VolumeSpec
from blockd.node.operations import Operations
from blockd.node.views import ReplicaView, SnapshotView, VolumeView, snapshot_views
from protocol.errors import BlockdError, RequestError

WAIT_SECONDS = 60.0
WAIT_SECONDS_MAX = 3600.0  # a client that wants longer asks again
BODY_BYTES_MAX = 64 << 10  # the largest sensible body is a snapshot with its labels
LABELS_MAX = 64
LABEL_BYTES_MAX = 256

Wait = Annotated[
    float,
    Parameter(ge=0, le=WAIT_SECONDS_MAX, description="Seconds to wait; 0: do not."),
]


class VolumeBody(msgspec.Struct, forbid_unknown_fields=True):
    """A volume to create."""

    name: str
    size_bytes: int
    replicas: int = 3
    block_size: int = 4096
    rebuild_wait_seconds: float = REBUILD_WAIT_SECONDS
    labels: dict[str, str] = {}


class AttachBody(msgspec.Struct, forbid_unknown_fields=True):
    """How to attach."""

    frontend: str = "auto"


class MountBody(msgspec.Struct, forbid_unknown_fields=True):
    """Where to mount; the file system is made only on a blank volume."""

    path: str | None = None
    fs: str = "ext4"


class SnapshotBody(msgspec.Struct, forbid_unknown_fields=True):
    """A snapshot to make."""

    name: str
    labels: dict[str, str] = {}


class RevertBody(msgspec.Struct, forbid_unknown_fields=True):
    """`force`: unmount, detach, revert and put back, if the volume is attached."""

    force: bool = False


class RebuildBody(msgspec.Struct, forbid_unknown_fields=True):
    """`replica`: only this one; else all that are OUT."""

    replica: str | None = None


class EmptyBody(msgspec.Struct, forbid_unknown_fields=True):
    """Nothing to say."""


class ErrorBody(msgspec.Struct):
    """Every error's answer."""

    code: str
    message: str
    retry: bool


class StatusView(msgspec.Struct):
    """The node service itself."""

    version: str
    node: str
    pid: int
    started: str
    home: str
    socket: str
    listen: str | None
    volume_count: int
    attached_count: int
    front_ends: dict[str, str | None]


class VersionView(msgspec.Struct):
    """The program's version and the API's."""

    version: str
    api: str


@get("/v1/version", sync_to_thread=False)
def version() -> VersionView:
    """The version."""
    return VersionView(version=__version__, api="v1")


@get("/v1/status", sync_to_thread=True)
def status(context: Context, service: StatusView) -> StatusView:
    """The state of the node service."""
    views = Operations(context).volumes()
    return msgspec.structs.replace(
        service,
        volume_count=len(views),
        attached_count=sum(view.state == "attached" for view in views),
        front_ends=availability(),
    )


@get("/v1/nodes", sync_to_thread=True)
def nodes(context: Context) -> list[Node]:
    """The nodes."""
    return context.store.list(Node)


@get("/v1/disks", sync_to_thread=True)
def disks(context: Context) -> list[Disk]:
    """The disks."""
    return context.store.list(Disk)


@get("/v1/volumes", sync_to_thread=True)
def volume_list(operations: Operations) -> list[VolumeView]:
    """All volumes."""
    return operations.volumes()


@post("/v1/volumes", sync_to_thread=True)
def volume_create(
    operations: Operations, data: VolumeBody, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Create a volume."""
    spec = VolumeSpec(
        size_bytes=data.size_bytes,
        replicas=data.replicas,
        block_size=data.block_size,
        rebuild_wait_seconds=data.rebuild_wait_seconds,
    )
    return operations.create(data.name, spec, _checked_labels(data.labels), wait)


@get("/v1/volumes/{name:str}", sync_to_thread=True)
def volume_show(operations: Operations, name: str) -> VolumeView:
    """One volume."""
    return operations.volume(name)


@delete("/v1/volumes/{name:str}", status_code=200, sync_to_thread=True)
def volume_delete(
    operations: Operations, name: str, force: bool = False, wait: Wait = WAIT_SECONDS
) -> EmptyBody:
    """Remove a volume and its data."""
    operations.remove(name, force, wait)
    return EmptyBody()


@post("/v1/volumes/{name:str}/attach", status_code=200, sync_to_thread=True)
def volume_attach(
    operations: Operations, name: str, data: AttachBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Attach a volume."""
    return operations.attach(name, (data or AttachBody()).frontend, wait)


@post("/v1/volumes/{name:str}/detach", status_code=200, sync_to_thread=True)
def volume_detach(
    operations: Operations, name: str, data: EmptyBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Detach a volume."""
    return operations.detach(name, wait)


@post("/v1/volumes/{name:str}/mount", status_code=200, sync_to_thread=True)
def volume_mount(
    operations: Operations, name: str, data: MountBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Mount an attached volume."""
    body = data or MountBody()
    return operations.mount(name, body.path, body.fs, wait)


@post("/v1/volumes/{name:str}/umount", status_code=200, sync_to_thread=True)
def volume_umount(
    operations: Operations, name: str, data: EmptyBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Unmount a volume."""
    return operations.unmount(name, wait)


@get("/v1/volumes/{name:str}/snapshots", sync_to_thread=True)
def snapshot_list(operations: Operations, context: Context, name: str) -> list[SnapshotView]:
    """The snapshots of a volume, oldest first."""
    operations.volume(name)
    return snapshot_views(context, name)


@post("/v1/volumes/{name:str}/snapshots", sync_to_thread=True)
def snapshot_create(
    operations: Operations, name: str, data: SnapshotBody, wait: Wait = WAIT_SECONDS
) -> SnapshotView:
    """Make a snapshot."""
    return operations.snapshot_create(name, data.name, _checked_labels(data.labels), wait)


@get("/v1/volumes/{name:str}/snapshots/{snapshot:str}", sync_to_thread=True)
def snapshot_show(operations: Operations, name: str, snapshot: str) -> SnapshotView:
    """One snapshot."""
    return operations.snapshot(name, snapshot)


@delete("/v1/volumes/{name:str}/snapshots/{snapshot:str}", status_code=200, sync_to_thread=True)
def snapshot_delete(
    operations: Operations, name: str, snapshot: str, wait: Wait = WAIT_SECONDS
) -> EmptyBody:
    """Remove a snapshot."""
    operations.snapshot_remove(name, snapshot, wait)
    return EmptyBody()


@post(
    "/v1/volumes/{name:str}/snapshots/{snapshot:str}/revert", status_code=200, sync_to_thread=True
)
def snapshot_revert(
    operations: Operations,
    name: str,
    snapshot: str,
    data: RevertBody | None = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Give the volume the content of a snapshot."""
    return operations.revert(name, snapshot, (data or RevertBody()).force, wait)


@get("/v1/volumes/{name:str}/replicas", sync_to_thread=True)
def replica_list(operations: Operations, name: str) -> list[ReplicaView]:
    """The replicas of a volume."""
    return operations.volume(name).replicas


@post("/v1/volumes/{name:str}/replicas", sync_to_thread=True)
def replica_add(
    operations: Operations, name: str, data: EmptyBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Add a replica."""
    return operations.replica_add(name, wait)


@delete("/v1/volumes/{name:str}/replicas/{replica:str}", status_code=200, sync_to_thread=True)
def replica_delete(
    operations: Operations, name: str, replica: str, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Remove a replica and its data."""
    return operations.replica_remove(name, replica, wait)


@post("/v1/volumes/{name:str}/rebuild", status_code=200, sync_to_thread=True)
def rebuild(
    operations: Operations, name: str, data: RebuildBody | None = None, wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Start rebuilding what is OUT."""
    return operations.rebuild(name, (data or RebuildBody()).replica, wait)


HANDLERS = [
    version,
    status,
    nodes,
    disks,
    volume_list,
    volume_create,
    volume_show,
    volume_delete,
    volume_attach,
    volume_detach,
    volume_mount,
    volume_umount,
    snapshot_list,
    snapshot_create,
    snapshot_show,
    snapshot_delete,
    snapshot_revert,
    replica_list,
    replica_add,
    replica_delete,
    rebuild,
]


def make_app(context: Context, service: StatusView, token: str | None) -> Litestar:
    """The application; with a token every request must bring it."""
    operations = Operations(context)
    return Litestar(
        route_handlers=HANDLERS,
        guards=[_token_guard(token)] if token is not None else [],
        dependencies={
            "context": _provide(context),
            "operations": _provide(operations),
            "service": _provide(service),
        },
        exception_handlers={
            BlockdError: _family_answer,
            HTTPException: _http_answer,
            Exception: _unexpected_answer,
        },
        openapi_config=OpenAPIConfig(
            title="blockd node service",
            version=__version__,
            path="/schema",
            # The renderers that load scripts from elsewhere are left out.
            render_plugins=[JsonRenderPlugin(), YamlRenderPlugin()],
        ),
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,
        debug=False,
    )


def _provide(value: Any) -> Any:
    from litestar.di import Provide

    return Provide(lambda: value, sync_to_thread=False, use_cache=True)


def _token_guard(token: str) -> Callable[[ASGIConnection[Any, Any, Any, Any], Any], None]:
    expected = f"Bearer {token}".encode()

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        given = connection.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            raise NotAuthorizedException(
                "a bearer token is required here; it is in the file `token` of the service's home"
            )

    return guard


def _checked_labels(labels: dict[str, str]) -> dict[str, str]:
    if len(labels) > LABELS_MAX:
        raise RequestError(f"{len(labels)} labels are too many, the limit is {LABELS_MAX}")
    for key, value in labels.items():
        if not key or len(key.encode()) > LABEL_BYTES_MAX or len(value.encode()) > LABEL_BYTES_MAX:
            raise RequestError(
                f"label {key[:40]!r}: key and value have at most {LABEL_BYTES_MAX} bytes, "
                "and the key is not empty"
            )
    return labels


def _answer(code: str, message: str, retry: bool, http_status: int) -> Response[ErrorBody]:
    return Response(
        ErrorBody(code=code, message=message, retry=retry),
        status_code=http_status,
        media_type="application/json",
    )


def _family_answer(_: Request[Any, Any, Any], error: BlockdError) -> Response[ErrorBody]:
    return _answer(error.code, str(error), error.retry, error.http_status)


def _http_answer(request: Request[Any, Any, Any], error: HTTPException) -> Response[ErrorBody]:
    """What the framework refuses: unknown paths, bad bodies, missing tokens."""
    message = error.detail
    if isinstance(error, ValidationException) and isinstance(error.extra, list):
        parts = [_validation_text(part) for part in error.extra]
        message = f"{request.method} {request.url.path}: {'; '.join(parts) or error.detail}"
    elif isinstance(error, NotFoundException):
        message = f"{request.url.path} does not exist; see /schema/openapi.json"
        return _answer("not_found", message, False, 404)
    elif isinstance(error, MethodNotAllowedException):
        message = f"{request.method} is not possible on {request.url.path}"
    code = "bad_request" if error.status_code < 500 else "failed"
    return _answer(code, message, False, error.status_code)


def _validation_text(part: Any) -> str:
    if isinstance(part, dict):
        words = [str(part[key]) for key in ("key", "message") if part.get(key)]
        return ": ".join(words)
    return str(part)


def _unexpected_answer(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    log.error("%s %s: unexpected error", request.method, request.url.path, exc_info=error)
    message = "internal error; the log of the node service tells more"
    return _answer("failed", message, False, 500)
