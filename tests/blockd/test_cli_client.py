"""How the command line reaches the node service.

Proves that a long home directory still has a usable socket, that TCP calls carry the token and
never use a web proxy, and that every way a connection can fail is told in one sentence.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from blockd.cli import main
from blockd.client import SOCKET_PATH_BYTES_MAX, Client
from protocol.errors import DeadlineError, PeerError, StateError
from tests.blockd.cli_fake_node import serving_tcp, serving_unix


def test_a_home_longer_than_a_socket_address_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / ("d" * 60) / ("e" * 60)
    home.mkdir(parents=True)
    assert len(str(home / "blockd.sock")) > SOCKET_PATH_BYTES_MAX
    monkeypatch.chdir(home)  # the fake binds by its short relative name
    with serving_unix(Path("blockd.sock")) as node, Client.over_unix(home) as client:
        node.answer("GET", "/v1/volumes", [])
        assert client.volumes() == []


def test_a_tcp_call_carries_the_token_and_uses_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    (tmp_path / "token").write_text("s3cret\n")
    with serving_tcp() as (node, url):
        node.answer("GET", "/v1/volumes", [])
        assert main(["--home", str(tmp_path), "--url", url, "volume", "ls"]) == 0
        assert node.asked[0].authorization == "Bearer s3cret"
        (tmp_path / "token").unlink()
        assert main(["--home", str(tmp_path), "--url", url, "volume", "ls"]) == 2
    assert f"{tmp_path}/token" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:x"])
def test_a_bad_url_is_a_usage_error(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    assert main(["--url", url, "--token-file", str(token), "volume", "ls"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_socket_nobody_listens_on_is_no_service(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "blockd.sock"))
    with (
        Client.over_unix(tmp_path) as client,
        pytest.raises(StateError, match="is not running at"),
    ):
        client.volumes()


def test_a_service_that_never_answers_or_breaks_off_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockd.client.ANSWER_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener, Client.over_unix(tmp_path) as client:
        listener.bind(str(tmp_path / "blockd.sock"))
        listener.listen()
        with pytest.raises(DeadlineError, match="did not answer"):
            client.volumes()

        def break_off() -> None:
            for _ in range(2):  # the first connection is the one given up above
                listener.accept()[0].close()

        thread = threading.Thread(target=break_off, daemon=True)
        thread.start()
        with pytest.raises(PeerError, match="broke off"):
            client.volumes()
        thread.join(timeout=5)


@pytest.mark.parametrize("kind", ["replica", "volume"])
def test_a_daemon_never_loads_the_libraries_of_the_command_line(kind: str) -> None:
    probe = (
        f"import sys; sys.argv = ['blockd', 'daemon', '{kind}', '--help']\n"
        "from blockd.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'click', 'rich', 'httpx', 'litestar', 'asyncio', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
