"""The set-up script, the Makefile and the CI script.

Proves that a missing Python is told in one line, that a finished set-up does nothing more, that the
targets exist, and that a CI run in which no test ran is a failure. Nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what set-up reads."""
    for name in ("pyproject.toml", "Makefile", "scripts/setup", ".ci/run"):
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, target)
    # Set-up must not install anything here: nobody is root.
    fake_id = tmp_path / "bin/id"
    fake_id.parent.mkdir()
    fake_id.write_text("#!/bin/sh\necho 1000\n")
    fake_id.chmod(0o755)
    return tmp_path


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=tree,
        env={**os.environ, "PATH": f"{tree}/bin:{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("python", ["/nonexistent/python3", "/bin/false"])
def test_without_a_usable_python_setup_ends_with_one_line(tree: Path, python: str) -> None:
    done = run(tree, "scripts/setup", PYTHON=python)
    assert done.returncode == 1
    assert "Python 3.11" in done.stderr
    assert python in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tree / ".venv").exists()


def test_a_finished_setup_is_left_alone_and_a_changed_project_is_not(tree: Path) -> None:
    called = tree / "pip-was-called"
    python = tree / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    # An environment whose pip only notes that it was called.
    python.write_text(f'#!/bin/sh\ncase "$*" in *pip*) touch {called};; esac\n')
    python.chmod(0o755)
    checksum = subprocess.run(
        ["cksum"], stdin=(tree / "pyproject.toml").open(), capture_output=True, check=True
    )
    (tree / ".venv/.blockd-setup").write_bytes(checksum.stdout)
    assert run(tree, "scripts/setup").returncode == 0
    assert not called.exists()
    with (tree / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    assert run(tree, "scripts/setup").returncode == 0
    assert called.exists()


def test_help_lists_every_target_the_project_promises(tree: Path) -> None:
    printed = run(tree, "make", "help").stdout
    for target in ("run", "test", "check", "perf", "sim"):
        assert f"make {target} " in printed


@pytest.mark.parametrize(
    ("suites", "code"),
    [
        ('<testsuite tests="3" skipped="1"/>', 0),
        ('<testsuite tests="2" skipped="2"/>', 1),
        ('<testsuite tests="0" skipped="0"/>', 1),
    ],
)
def test_ci_fails_when_no_test_ran(tree: Path, suites: str, code: int) -> None:
    (tree / ".venv/bin").mkdir(parents=True)
    (tree / ".venv/bin/python").symlink_to(sys.executable)
    make = tree / "bin/make"
    make.write_text(
        "#!/bin/sh\n"
        "report=${2#PYTEST_OPTIONS=--junitxml=}\n"
        f"echo '<testsuites>{suites}</testsuites>' >\"$report\"\n"
    )
    make.chmod(0o755)
    done = run(tree, ".ci/run")
    assert done.returncode == code, done.stderr
    assert "tests ran" in done.stdout


def test_ci_fails_when_make_test_fails(tree: Path) -> None:
    make = tree / "bin/make"
    make.write_text("#!/bin/sh\nexit 2\n")
    make.chmod(0o755)
    assert run(tree, ".ci/run").returncode == 2
