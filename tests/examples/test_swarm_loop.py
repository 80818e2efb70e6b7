"""``examples/swarm_loop.py``: terminals train together, come and go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


EXAMPLE = Path(__file__).parents[2] / "examples" / "swarm_loop.py"
SECONDS = 200  # of which loading PyTorch on a busy machine takes most
SECONDS_TO_LEAVE = 20  # 5, and what a busy machine takes for the end of the interpreter
SMALL = ("--relay", "none", "--width", "16", "--layers", "1")


@contextmanager
def terminal(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    source = EXAMPLE.parents[1] / "src"
    process = warm_python.Popen(
        [sys.executable, str(EXAMPLE), *SMALL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line_with(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        if text in line:
            return line
        seen.append(line)
    raise AssertionError(f"it never said {text!r}: {''.join(seen)}")


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=SECONDS)
    return process.returncode, output


def weights_in(output: str) -> str:
    found = re.search(r"weights ([0-9a-f]{16})", output)
    assert found is not None, output
    return found[1]


@pytest.mark.timeout(2 * SECONDS)
def test_one_leaves_another_comes_and_all_who_stay_end_equal(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with terminal("--steps", "30", "--peers", "2", "--checkpoints", folder) as host:
        ticket = line_with(host, "--run ").split()[-1]
        with terminal("--steps", "30", "--run", ticket) as guest:
            line_with(guest, "step 10: loss")
            guest.send_signal(signal.SIGINT)
            left_at = time.monotonic()
            code, output = ended(guest)
            assert time.monotonic() - left_at < SECONDS_TO_LEAVE
            assert code == 130
            assert "Traceback" not in output
        with terminal("--steps", "30", "--run", ticket) as friend:
            outputs = [ended(friend), ended(host)]
    assert [code for code, _ in outputs] == [0, 0], outputs
    assert len({weights_in(output) for _, output in outputs}) == 1
    assert (folder / "step-00000033").exists()


def test_a_malformed_ticket_is_one_clear_sentence() -> None:
    with terminal("--run", "psyche1nonsense") as process:
        code, output = ended(process)
    assert code == 1
    assert len(output.splitlines()) == 1, output
    assert "Traceback" not in output
