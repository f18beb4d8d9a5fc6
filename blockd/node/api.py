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
from litestar import Litestar, delete, get, patch, post
from litestar.connection import ASGIConnection
from litestar.di import NamedDependency, Provide
from litestar.exceptions import (
    NotAuthorizedException,
)
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin, YamlRenderPlugin
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from blockd import __version__
from blockd.frontends import availability
from blockd.node import api_errors
from blockd.node.api_types import (
    AttachBody,
    CloneBody,
    EmptyBody,
    MountBody,
    RebuildBody,
    ResizeBody,
    RevertBody,
    SnapshotBody,
    StatusView,
    UpgradeBody,
    VersionView,
    VolumeBody,
    VolumeChangeBody,
    checked_labels,
)
from blockd.node.context import Context
from blockd.node.objects import Disk, Node, VolumeSpec
from blockd.node.operations import Operations
from blockd.node.reconcile_clones import clone_spec
from blockd.node.views import DiffView, ReplicaView, SnapshotView, UsageView, VolumeView

WAIT_SECONDS = 60.0
WAIT_SECONDS_MAX = 3600.0  # a client that wants longer asks again
BODY_BYTES_MAX = 64 << 10  # the largest sensible body is a snapshot with its labels

Wait = Annotated[
    float,
    QueryParameter(ge=0, le=WAIT_SECONDS_MAX, description="Seconds to wait; 0: do not."),
]


Ops = NamedDependency[Operations]
Ctx = NamedDependency[Context]
Service = NamedDependency[StatusView]


@get("/v1/version", sync_to_thread=False)
def version() -> VersionView:
    """The version."""
    return VersionView(version=__version__, api="v1")


@get("/v1/status", sync_to_thread=True)
def status(context: Ctx, service: Service) -> StatusView:
    """The state of the node service."""
    views = Operations(context).volumes()
    return msgspec.structs.replace(
        service,
        volume_count=len(views),
        attached_count=sum(view.state == "attached" for view in views),
        front_ends=availability(),
    )


@get("/v1/nodes", sync_to_thread=True)
def nodes(context: Ctx) -> list[Node]:
    """The nodes."""
    return context.store.list(Node)


@get("/v1/disks", sync_to_thread=True)
def disks(context: Ctx) -> list[Disk]:
    """The disks."""
    return context.store.list(Disk)


@get("/v1/volumes", sync_to_thread=True)
def volume_list(operations: Ops) -> list[VolumeView]:
    """All volumes."""
    return operations.volumes()


@post("/v1/volumes", sync_to_thread=True)
def volume_create(
    operations: Ops, data: JSONBody[VolumeBody], wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Create a volume."""
    spec = VolumeSpec(
        size_bytes=data.size_bytes,
        replicas=data.replicas,
        block_size=data.block_size,
        rebuild_wait_seconds=data.rebuild_wait_seconds,
        rebuild_bandwidth=data.rebuild_bandwidth,
        min_in_sync=data.min_in_sync,
    )
    return operations.create(data.name, spec, checked_labels(data.labels), wait)


@get("/v1/volumes/{name:str}", sync_to_thread=True)
def volume_show(operations: Ops, name: FromPath[str]) -> VolumeView:
    """One volume."""
    return operations.volume(name)


# A path of its own: Litestar 2.25 answers nonsense where three handlers in threads share one.
@patch("/v1/volumes/{name:str}/settings", sync_to_thread=True)
def volume_change(
    operations: Ops, name: FromPath[str], data: JSONBody[VolumeChangeBody]
) -> VolumeView:
    """Change how a volume is kept."""
    changes = {
        key: value
        for key, value in msgspec.structs.asdict(data).items()
        if value is not msgspec.UNSET
    }
    return operations.change(name, changes)


@post("/v1/volumes/{name:str}/resize", status_code=200, sync_to_thread=True)
def volume_resize(
    operations: Ops, name: FromPath[str], data: JSONBody[ResizeBody], wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Make a volume larger."""
    return operations.resize(name, data.size_bytes, wait)


@post("/v1/volumes/{name:str}/upgrade", status_code=200, sync_to_thread=True)
def volume_upgrade(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[UpgradeBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Replace the daemons of a volume while it is in use."""
    return operations.upgrade(name, (data or UpgradeBody()).program, wait)


@delete("/v1/volumes/{name:str}", status_code=200, sync_to_thread=True)
def volume_delete(
    operations: Ops, name: FromPath[str], force: FromQuery[bool] = False, wait: Wait = WAIT_SECONDS
) -> EmptyBody:
    """Remove a volume and its data."""
    operations.remove(name, force, wait)
    return EmptyBody()


@post("/v1/volumes/{name:str}/attach", status_code=200, sync_to_thread=True)
def volume_attach(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[AttachBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Attach a volume."""
    return operations.attach(name, (data or AttachBody()).frontend, wait)


@post("/v1/volumes/{name:str}/detach", status_code=200, sync_to_thread=True)
def volume_detach(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[EmptyBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Detach a volume."""
    return operations.detach(name, wait)


@post("/v1/volumes/{name:str}/mount", status_code=200, sync_to_thread=True)
def volume_mount(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[MountBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Mount an attached volume."""
    body = data or MountBody()
    return operations.mount(name, body.path, body.fs, wait)


@post("/v1/volumes/{name:str}/umount", status_code=200, sync_to_thread=True)
def volume_umount(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[EmptyBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Unmount a volume."""
    return operations.unmount(name, wait)


@get("/v1/volumes/{name:str}/snapshots", sync_to_thread=True)
def snapshot_list(operations: Ops, context: Ctx, name: FromPath[str]) -> list[SnapshotView]:
    """The snapshots of a volume, oldest first."""
    return operations.volume(name).snapshots


@post("/v1/volumes/{name:str}/snapshots", sync_to_thread=True)
def snapshot_create(
    operations: Ops, name: FromPath[str], data: JSONBody[SnapshotBody], wait: Wait = WAIT_SECONDS
) -> SnapshotView:
    """Make a snapshot."""
    labels = checked_labels(data.labels)
    return operations.snapshot_create(name, data.name, labels, wait, data.freeze)


@get("/v1/volumes/{name:str}/snapshots/{snapshot:str}", sync_to_thread=True)
def snapshot_show(operations: Ops, name: FromPath[str], snapshot: FromPath[str]) -> SnapshotView:
    """One snapshot."""
    return operations.snapshot(name, snapshot)


@delete("/v1/volumes/{name:str}/snapshots/{snapshot:str}", status_code=200, sync_to_thread=True)
def snapshot_delete(
    operations: Ops, name: FromPath[str], snapshot: FromPath[str], wait: Wait = WAIT_SECONDS
) -> EmptyBody:
    """Remove a snapshot."""
    operations.snapshot_remove(name, snapshot, wait)
    return EmptyBody()


@post(
    "/v1/volumes/{name:str}/snapshots/{snapshot:str}/revert", status_code=200, sync_to_thread=True
)
def snapshot_revert(
    operations: Ops,
    name: FromPath[str],
    snapshot: FromPath[str],
    data: JSONBody[RevertBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Give the volume the content of a snapshot."""
    return operations.revert(name, snapshot, (data or RevertBody()).force, wait)


@post(
    "/v1/volumes/{name:str}/snapshots/{snapshot:str}/attach", status_code=200, sync_to_thread=True
)
def snapshot_attach(
    operations: Ops,
    name: FromPath[str],
    snapshot: FromPath[str],
    data: JSONBody[AttachBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> SnapshotView:
    """Give a snapshot a read-only device or NBD address of its own."""
    return operations.snapshot_attach(name, snapshot, (data or AttachBody()).frontend, wait)


@post(
    "/v1/volumes/{name:str}/snapshots/{snapshot:str}/detach", status_code=200, sync_to_thread=True
)
def snapshot_detach(
    operations: Ops,
    name: FromPath[str],
    snapshot: FromPath[str],
    data: JSONBody[EmptyBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> SnapshotView:
    """Take a snapshot's device down."""
    return operations.snapshot_detach(name, snapshot, wait)


@post("/v1/volumes/{name:str}/snapshots/{snapshot:str}/clone", sync_to_thread=True)
def snapshot_clone(
    operations: Ops,
    context: Ctx,
    name: FromPath[str],
    snapshot: FromPath[str],
    data: JSONBody[CloneBody],
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Make a new volume with the content of a snapshot."""
    spec = clone_spec(
        context,
        name,
        snapshot,
        replicas=data.replicas,
        size_bytes=data.size_bytes,
        full=data.full,
    )
    return operations.create(data.name, spec, checked_labels(data.labels), wait)


@get("/v1/volumes/{name:str}/snapshots/{snapshot:str}/diff", sync_to_thread=True)
def snapshot_diff(
    operations: Ops,
    name: FromPath[str],
    snapshot: FromPath[str],
    to: Annotated[
        str, QueryParameter(description="a later snapshot; without: the volume now")
    ] = "",
    offset: Annotated[int, QueryParameter(ge=0, description="where to go on")] = 0,
) -> DiffView:
    """Where the volume, or another snapshot, may differ from a snapshot."""
    return operations.snapshot_diff(name, snapshot, to, offset)


@get("/v1/volumes/{name:str}/usage", sync_to_thread=True)
def volume_usage(operations: Ops, name: FromPath[str], wait: Wait = WAIT_SECONDS) -> UsageView:
    """How much data the volume and its snapshots show, and what deleting one gives back."""
    return operations.usage(name, wait)


@get("/v1/volumes/{name:str}/replicas", sync_to_thread=True)
def replica_list(operations: Ops, name: FromPath[str]) -> list[ReplicaView]:
    """The replicas of a volume."""
    return operations.volume(name).replicas


@post("/v1/volumes/{name:str}/replicas", sync_to_thread=True)
def replica_add(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[EmptyBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Add a replica."""
    return operations.replica_add(name, wait)


@delete("/v1/volumes/{name:str}/replicas/{replica:str}", status_code=200, sync_to_thread=True)
def replica_delete(
    operations: Ops, name: FromPath[str], replica: FromPath[str], wait: Wait = WAIT_SECONDS
) -> VolumeView:
    """Remove a replica and its data."""
    return operations.replica_remove(name, replica, wait)


@post("/v1/volumes/{name:str}/rebuild", status_code=200, sync_to_thread=True)
def rebuild(
    operations: Ops,
    name: FromPath[str],
    data: JSONBody[RebuildBody | None] = None,
    wait: Wait = WAIT_SECONDS,
) -> VolumeView:
    """Start rebuilding what is OUT."""
    return operations.rebuild(name, (data or RebuildBody()).replica, wait)


@post("/v1/volumes/{name:str}/verify", status_code=200, sync_to_thread=True)
def verify(
    operations: Ops, name: FromPath[str], data: JSONBody[EmptyBody | None] = None
) -> VolumeView:
    """Begin to verify all replicas; `verify` of the volume shows how far it is."""
    return operations.verify(name)


HANDLERS = [
    version,
    status,
    nodes,
    disks,
    volume_list,
    volume_create,
    volume_show,
    volume_change,
    volume_resize,
    volume_upgrade,
    volume_usage,
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
    snapshot_attach,
    snapshot_detach,
    snapshot_clone,
    snapshot_diff,
    replica_list,
    replica_add,
    replica_delete,
    rebuild,
    verify,
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
        exception_handlers=api_errors.HANDLERS,
        openapi_config=OpenAPIConfig(
            title="blockd node service",
            version=__version__,
            path="/schema",
            operation_id_creator=_operation_id,
            # The renderers that load scripts from elsewhere are left out.
            render_plugins=[JsonRenderPlugin(), YamlRenderPlugin()],
        ),
        request_max_body_size=BODY_BYTES_MAX,
        logging_config=None,
        debug=False,
    )


def _provide(value: Any) -> Any:
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


def _operation_id(_: Any, method: Any, path: list[Any]) -> str:
    """Such as get_v1_volumes_name."""
    return "_".join([str(method.value).lower(), *(getattr(part, "name", part) for part in path)])
