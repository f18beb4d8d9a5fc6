"""Proves that `blockd node install` puts units in place that systemd understands, that are as
closed as they can be, and that a normal installation carries; nothing of others is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blockd.node import units
from tests.blockd.cli_fake_node import Run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = shutil.which("true") or "/bin/true"  # systemd looks whether the program is there
FOLDER = "usr/local/lib/systemd/system"
UNITS = ("blockd.service", "blockd-replica@.service", "blockd-volume@.service")

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed; apt-get install systemd",
)

# What gives a service a mount namespace of its own, so that its mounts stay there
# (systemd.exec(5)), or shuts it off from block devices (systemd.resource-control(5)).
APART = re.compile(
    r"Private(Tmp|Devices|Mounts|Users|Network|IPC|PIDs)|Protect(System|Home|Proc|Clock)"
    r"|Protect(KernelTunables|KernelModules|KernelLogs|ControlGroups|Hostname)|ProcSubset"
    r"|(ReadWrite|ReadOnly|Inaccessible|Exec|NoExec|BindReadOnly|Bind)Paths|TemporaryFileSystem"
    r"|Root(Directory|Image|Hash)|(Mount|Extension)Images|ExtensionDirectories|MountFlags"
    r"|DynamicUser|MountAPIVFS|LogNamespace|NetworkNamespacePath|IPCNamespacePath|Load\w*Credential\w*"
    r"|DeviceAllow|DevicePolicy"
)


@pytest.fixture
def root(tmp_path: Path, run: Run) -> Path:
    """The root directory of a machine with everything installed."""
    made = tmp_path / "root"
    assert run("node", "install", "--root", str(made), "--program", PROGRAM)[0] == 0
    return made


def _settings(path: Path) -> list[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line[:1] not in ("", "#", "[")]
    return [(line.partition("=")[0], line.partition("=")[2]) for line in lines]


def _unit(root: Path, name: str) -> Path:
    """A unit's file; of a template, an instance."""
    path = root / FOLDER / name
    if "@" in name:
        shutil.copy(path, path.with_name(name.replace("@", "@data")))
        path = path.with_name(name.replace("@", "@data"))
    return path


def test_what_is_installed_names_program_home_and_address(run: Run, tmp_path: Path) -> None:
    words = ["node", "install", "--root", str(tmp_path), "--program", "/opt/blockd/bin/blockd"]
    code, printed, _ = run(*words, "--home", "/srv/b", "--listen", "[::1]:9500", "-o", "json")
    answer = json.loads(printed)
    assert code == 0
    assert {item["action"] for item in answer["files"]} == {"installed"}
    for item in answer["files"]:
        assert not re.search(r"@[A-Z]+@", Path(item["path"]).read_text()), item
        assert Path(item["path"]).stat().st_mode & 0o777 == 0o644
    service = dict(_settings(tmp_path / FOLDER / "blockd.service"))
    assert service["ExecStart"] == (
        "/opt/blockd/bin/blockd --home /srv/b serve --listen [::1]:9500"
    )
    assert service["RequiresMountsFor"] == "/srv/b"
    rules = (tmp_path / "usr/local/lib/udev/rules.d/60-blockd.rules").read_text()
    assert '"/srv/b/volumes/*/device"' in rules
    assert "systemctl daemon-reload" in answer["next"]
    before = {item["path"]: os.stat(item["path"]).st_mtime_ns for item in answer["files"]}
    code, printed, _ = run(*words, "--home", "/srv/b", "--listen", "[::1]:9500", "-o", "json")
    assert {item["action"] for item in json.loads(printed)["files"]} == {"unchanged"}
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    code, printed, _ = run(*words, "--home", "/srv/b")
    assert "updated" in printed
    assert "--listen" not in (tmp_path / FOLDER / "blockd.service").read_text()


def test_the_program_is_that_of_this_installation_and_the_home_the_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCKD_HOME", raising=False)
    command = [sys.executable, "-m", "blockd", "node", "install", "--root", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    service = dict(_settings(tmp_path / FOLDER / "blockd.service"))
    program = Path(sys.executable).parent / "blockd"
    assert service["ExecStart"] == f"{program} --home /var/lib/blockd serve"


def test_removing_takes_what_is_ours_and_nothing_that_is_enabled(root: Path, run: Run) -> None:
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "blockd.service").symlink_to("/usr/local/lib/systemd/system/blockd.service")
    other = root / FOLDER / "other.service"
    other.touch()
    code, _, complaint = run("node", "uninstall", "--root", str(root))
    assert code == 4
    assert "systemctl disable --now blockd.service" in complaint
    assert (root / FOLDER / "blockd.service").exists()
    (wants / "blockd.service").unlink()
    assert run("node", "uninstall", "--root", str(root))[0] == 0
    assert [path for path in root.rglob("*") if path.is_file()] == [other]
    code, printed, _ = run("node", "uninstall", "--root", str(root), "-o", "json")
    assert code == 0
    assert {item["action"] for item in json.loads(printed)["files"]} == {"absent"}


def test_a_file_of_somebody_else_is_left_and_then_nothing_is_written(
    tmp_path: Path, run: Run
) -> None:
    theirs = tmp_path / FOLDER / "blockd-volume@.service"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("[Service]\nExecStart=/bin/true\n")
    for verb in ("install", "uninstall"):
        code, _, complaint = run("node", verb, "--root", str(tmp_path))
        assert code == 4
        assert str(theirs) in complaint
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--home", "/with blank"),
        ("--home", "/with%h"),
        ("--home", "/with*"),
        ("--program", "blockd"),
        ("--listen", "9500"),
        ("--listen", "host:65536"),
        ("--listen", "a b:1"),
    ],
)
def test_what_a_unit_cannot_hold_is_refused(
    tmp_path: Path, run: Run, option: str, value: str
) -> None:
    root = tmp_path / "root"
    code, _, complaint = run("node", "install", "--root", str(root), option, value)
    assert code == 2
    assert value in complaint
    assert not root.exists()


@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_without_root_the_machine_is_not_touched(
    run: Run, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for path in ("/", "/tmp/.."):
        code, printed, complaint = run("node", verb, "--root", path)
        assert code == 1
        assert printed == ""
        assert complaint.count("\n") == 1
        assert "only root" in complaint


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_understands_every_line(root: Path, name: str) -> None:
    command = ["systemd-analyze", "verify", str(_unit(root, name))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    ours = [line for line in done.stderr.splitlines() if "blockd" in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize(("name", "limit"), list(zip(UNITS, (57, 18, 24), strict=True)))
def test_units_do_not_become_more_open(root: Path, name: str, limit: int) -> None:
    """Limits a little above what systemd 252 counts, in tenths; later ones know more options."""
    path = _unit(root, name)
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={limit}", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_node_service_mounts_for_all_and_leaves_the_data_path_alone(root: Path) -> None:
    settings = _settings(root / FOLDER / "blockd.service")
    assert [name for name, _ in settings if APART.fullmatch(name)] == []
    service = dict(settings)
    assert (service["KillMode"], service["OOMPolicy"]) == ("process", "continue")
    assert (service["Type"], service["Restart"]) == ("notify", "always")
    assert int(service["WatchdogSec"]) > 0
    # At shutdown it must be stopped before anything is unmounted.
    assert any("local-fs.target" in value for name, value in settings if name == "After")
    assert service.get("DefaultDependencies", "yes") == "yes"
    # `systemctl clean` would remove the data.
    assert "StateDirectory" not in service


@pytest.mark.parametrize("name", UNITS[1:])
def test_daemons_can_read_which_boot_this_is(root: Path, name: str) -> None:
    settings = dict(_settings(root / FOLDER / name))
    assert settings["ProcSubset"] == "all"
    assert "StateDirectory" not in settings


def test_the_rule_stands_between_those_it_corrects(root: Path) -> None:
    (path,) = (root / "usr/local/lib/udev/rules.d").iterdir()
    assert "60-block.rules" < path.name < "60-persistent-storage.rules"


def test_a_built_installation_carries_the_files(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="setuptools is not installed here; make setup")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree)
    for name in ("blockd", "protocol", "replication", "snapshots", "systemd"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = ["-c", "from setuptools import setup; setup()", "-q", "build", "--build-lib", "lib"]
    subprocess.run([sys.executable, *build], cwd=tree, check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(tree / "lib")}
    words = ["-m", "blockd", "node", "install", "--root", str(tmp_path / "root"), "-o", "json"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["files"]) == len(list(units.SOURCE.glob("*[es]"))) == 4
