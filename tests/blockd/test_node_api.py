"""Proves the API's manners: views, error bodies, validation of input, and the token on TCP."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from blockd.node import views
from tests.blockd.node_harness import MIB, NodeHarness

VOLUME_FIELDS = {
    *("name", "uid", "size_bytes", "allocated_bytes", "block_size", "state", "health"),
    *("frontend", "device", "nbd_uri", "mount", "epoch", "pid", "message", "created"),
    *("replicas", "snapshots"),
}
REPLICA_FIELDS = {"id", "state", "address", "path", "pid", "rebuild"}
SNAPSHOT_FIELDS = {"id", "name", "created", "labels"}


@pytest.fixture
def api(node: NodeHarness) -> Iterator[httpx.Client]:
    with node.client() as client:
        yield client


def test_a_volume_goes_through_its_life_over_the_api(api: httpx.Client) -> None:
    body = {"name": "data", "size_bytes": 64 * MIB, "replicas": 1, "labels": {"a": "b"}}
    answer = api.post("/v1/volumes", json=body)
    assert answer.status_code == 201
    view = answer.json()
    assert set(view) >= VOLUME_FIELDS
    assert set(view["replicas"][0]) >= REPLICA_FIELDS
    assert view["labels"] == {"a": "b"}
    assert api.get("/v1/volumes").json() == [view]
    attached = api.post("/v1/volumes/data/attach", json={"frontend": "socket"}).json()
    assert attached["state"] == "attached"
    answer = api.post("/v1/volumes/data/snapshots", json={"name": "s", "labels": {"k": "v"}})
    assert answer.status_code == 201
    assert set(answer.json()) >= SNAPSHOT_FIELDS
    assert api.get("/v1/volumes/data/snapshots/s").json() == answer.json()
    assert api.get("/v1/volumes/data/snapshots").json() == [answer.json()]
    assert len(api.get("/v1/volumes/data/replicas").json()) == 1
    assert api.post("/v1/volumes/data/detach").json()["state"] == "detached"
    assert api.delete("/v1/volumes/data/snapshots/s").status_code == 200
    assert api.delete("/v1/volumes/data").status_code == 200
    assert api.get("/v1/volumes").json() == []


def test_how_replicas_are_kept_can_be_changed(api: httpx.Client) -> None:
    api.post("/v1/volumes", json={"name": "data", "size_bytes": 64 * MIB, "replicas": 1})
    fields = {"rebuild_wait_seconds": 3600, "rebuild_bandwidth": 1 << 20}
    changed = api.patch("/v1/volumes/data/settings", json=fields)
    assert changed.status_code == 200
    assert changed.json().items() >= fields.items()
    changed = api.patch("/v1/volumes/data/settings", json={"rebuild_bandwidth": None})
    assert api.get("/v1/volumes/data").json()["rebuild_wait_seconds"] == 3600
    assert changed.json()["rebuild_bandwidth"] is None
    for body in (
        {"rebuild_wait_seconds": -1},
        {"rebuild_bandwidth": 50},
        {"min_in_sync": 0},
        {"min_in_sync": 2},
        {"replicas": 2},
        {},
    ):
        assert api.patch("/v1/volumes/data/settings", json=body).status_code == 400
    assert (
        api.patch("/v1/volumes/none/settings", json={"rebuild_wait_seconds": 1}).status_code == 404
    )


def test_the_service_tells_about_itself(api: httpx.Client) -> None:
    status = api.get("/v1/status").json()
    assert status["front_ends"]["socket"] is None
    assert "nbd" in status["front_ends"]["nbd"]
    assert api.get("/v1/version").json()["version"] == status["version"]
    (found,) = api.get("/v1/nodes").json()
    assert found["metadata"]["name"] == status["node"]
    (disk,) = api.get("/v1/disks").json()
    assert disk["spec"]["node"] == status["node"]


def test_the_schema_knows_every_path(api: httpx.Client) -> None:
    paths = api.get("/schema/openapi.json").json()["paths"]
    assert "/v1/volumes/{name}/snapshots/{snapshot}/revert" in paths
    assert "/v1/volumes/{name}/snapshots/{snapshot}/clone" in paths
    assert len(paths) == 25


GOOD = {"name": "data", "size_bytes": 64 * MIB}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "words"),
    [
        ("GET", "/v1/volumes/none", None, 404, "not_found", "volume none does not exist"),
        ("GET", "/v1/nothing", None, 404, "not_found", "/v1/nothing does not exist"),
        ("PUT", "/v1/volumes", None, 405, "bad_request", "PUT is not possible"),
        ("POST", "/v1/volumes", {**GOOD, "colour": 1}, 400, "bad_request", "colour"),
        ("POST", "/v1/volumes", {"name": "data"}, 400, "bad_request", "size_bytes"),
        ("POST", "/v1/volumes", {**GOOD, "size_bytes": "1G"}, 400, "bad_request", "size_bytes"),
        ("POST", "/v1/volumes", {**GOOD, "size_bytes": 5}, 400, "bad_request", "outside 1 MiB"),
        ("POST", "/v1/volumes", {**GOOD, "size_bytes": 1 << 63}, 400, "bad_request", "8 TiB"),
        ("POST", "/v1/volumes", {**GOOD, "size_bytes": MIB + 1}, 400, "bad_request", "multiple"),
        ("POST", "/v1/volumes", {**GOOD, "name": "../x"}, 400, "bad_request", "not usable"),
        ("POST", "/v1/volumes", {**GOOD, "replicas": 0}, 400, "bad_request", "outside 1 to 16"),
        ("POST", "/v1/volumes", {**GOOD, "replicas": 17}, 400, "bad_request", "outside 1 to 16"),
        ("POST", "/v1/volumes", {**GOOD, "block_size": 1024}, 400, "bad_request", "4096 or 512"),
        ("POST", "/v1/volumes", {**GOOD, "labels": {"": "x"}}, 400, "bad_request", "label"),
        ("POST", "/v1/volumes", [1], 400, "bad_request", "object"),
        ("POST", "/v1/volumes?wait=-1", GOOD, 400, "bad_request", "wait"),
        ("POST", "/v1/volumes?wait=soon", GOOD, 400, "bad_request", "wait"),
        ("POST", "/v1/volumes/none/attach", {}, 404, "not_found", "none"),
        ("POST", "/v1/volumes/none/attach", {"force": 1}, 400, "bad_request", "force"),
        ("DELETE", "/v1/volumes/none/snapshots/s", None, 404, "not_found", "none"),
    ],
)
def test_a_bad_request_gets_one_clear_error(
    api: httpx.Client, method: str, path: str, body: object, status: int, code: str, words: str
) -> None:
    answer = api.request(method, path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()
    assert set(error) == {"code", "message", "retry"}
    assert error["code"] == code
    assert words in error["message"]
    assert "Traceback" not in answer.text
    assert api.get("/v1/volumes").json() == []


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"name": "a" "b"}'])
def test_a_body_that_is_not_json_is_refused(api: httpx.Client, content: bytes) -> None:
    answer = api.post("/v1/volumes", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["code"] == "bad_request"


def test_a_body_that_is_too_large_is_refused(api: httpx.Client) -> None:
    answer = api.post("/v1/volumes", json={**GOOD, "labels": {"a": "x" * 100_000}})
    assert answer.status_code == 413
    assert answer.json()["code"] == "bad_request"


def test_a_duplicate_is_a_conflict_and_leaves_the_first_alone(api: httpx.Client) -> None:
    first = api.post("/v1/volumes", json={**GOOD, "replicas": 1}).json()
    answer = api.post("/v1/volumes", json={**GOOD, "replicas": 1})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert api.get("/v1/volumes/data").json()["uid"] == first["uid"]


def test_a_bug_is_answered_without_its_details(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("secret detail")

    api.post("/v1/volumes", json={**GOOD, "replicas": 1})
    monkeypatch.setattr(views, "snapshot_views", broken)
    answer = api.get("/v1/volumes/data")
    assert answer.status_code == 500
    assert answer.json()["code"] == "failed"
    assert "secret" not in answer.text


def test_the_unix_socket_and_the_secrets_are_for_the_owner_only(
    api: httpx.Client, node: NodeHarness
) -> None:
    api.post("/v1/volumes", json={**GOOD, "replicas": 1})
    key = node.root / "volumes" / "data" / "key"
    for path in (node.root / "blockd.sock", key, node.root / "state.db"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o177 == 0, path
    assert len(bytes.fromhex(key.read_text())) == 32


def test_on_tcp_every_request_needs_the_token(node: NodeHarness) -> None:
    with node.client("127.0.0.1:0") as api:
        port = node.service._listeners[1]._socket.getsockname()[1]
        assert api.get("/v1/status").status_code == 200, "the unix socket asks for none"
    token_path: Path = node.root / "token"
    assert stat.S_IMODE(token_path.stat().st_mode) == 0o600
    token = token_path.read_text().strip()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}):
            for path in ("/v1/volumes", "/v1/status", "/schema/openapi.json"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["code"] == "bad_request"
        answer = client.get("/v1/volumes", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200
