"""Two terminals exchange a file by ticket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "p2p_blob.py"
SECONDS = 60


def terminal(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), *map(str, arguments), "--local"]
    return warm_python.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


@contextmanager
def shared(path: Path) -> Iterator[str]:
    """A terminal that shares ``path``; gives its ticket, and sends Ctrl-C at the end."""
    process = terminal("share", path)
    try:
        assert process.stdout is not None
        ticket = process.stdout.readline().strip()
        assert ticket.startswith("blob"), process.communicate()
        yield ticket
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 130
        assert "No longer shared." in errors
        assert "Traceback" not in errors
    finally:
        process.kill()
        process.communicate()


def test_a_file_arrives_as_it_was_and_nothing_else_is_left(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.write_bytes(os.urandom(3_000_001))
    with shared(original) as ticket:
        getting = terminal("get", ticket, copy)
        _, told = getting.communicate(timeout=SECONDS)
        assert getting.returncode == 0, told
        assert copy.read_bytes() == original.read_bytes()
        assert "what its ticket promised" in told
        assert sorted(file.name for file in tmp_path.iterdir()) == ["copy", "original"]
        again = terminal("get", ticket, copy)
        assert "--force" in again.communicate(timeout=SECONDS)[1]
        assert again.returncode == 1


@pytest.mark.parametrize("ticket", ["nonsense", "blobaaaa"])
def test_a_wrong_ticket_is_explained(tmp_path: Path, ticket: str) -> None:
    process = terminal("get", ticket, tmp_path / "copy")
    _, told = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "ticket" in told
    assert "Traceback" not in told
