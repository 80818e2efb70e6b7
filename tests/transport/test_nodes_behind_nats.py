"""Nodes behind routers that translate addresses meet directly if they are told their public addresses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from transport import nat_world

pytestmark = pytest.mark.waiting

SECONDS = 90.0


def in_a_world_of_its_own(role: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-Urn", sys.executable, str(Path(nat_world.__file__)), role]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture
def world() -> None:
    for tool in ("unshare", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no program {tool} here")
    probe = in_a_world_of_its_own("probe")
    if probe.returncode != 0:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip().splitlines()[-1:]}")


@pytest.mark.slow
@pytest.mark.usefixtures("world")
def test_two_nodes_behind_nats_meet_directly_if_they_are_told_where_they_are_reached() -> None:
    meeting = in_a_world_of_its_own("meet")
    assert meeting.returncode == 0, meeting.stderr
    assert json.loads(meeting.stdout) == {
        "said": "hello",
        "path": "direct",
        "at": f"{nat_world.PUBLIC[0]}:{nat_world.FORWARDED}",
        "untold": "unreachable",  # its port is forwarded as well, but nobody knows
    }
