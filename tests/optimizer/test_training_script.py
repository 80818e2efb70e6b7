"""``examples/train_bytes.py`` trains, judges itself, and ends when told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import warm_python

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "train_bytes.py"
TIMEOUT = 150  # seconds, of which loading PyTorch on a busy machine takes most


def environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"}


def start(*args: str, script: Path = SCRIPT) -> subprocess.Popen[str]:
    return warm_python.Popen(
        [sys.executable, str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        its_children_too=True,
        start_new_session=True,  # so that a signal to its group does not reach the tests
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The script with two workers, past its first validation and with a long way to go."""
    process = start("--launch", "2", "--steps", "1000000", "--out", str(tmp_path))
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 0/") for line in process.stdout)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=TIMEOUT)


def test_two_workers_learn_send_little_and_end_with_equal_weights(tmp_path: Path) -> None:
    process = start("--launch", "2", "--steps", "12", "--target", "5.3", "--out", str(tmp_path))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert "equal on all ranks" in output
    assert "1 : 455" in output  # 8 of 4096 coefficients in 17 bits each, the heads included
    assert (tmp_path / "train_bytes.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_target_is_a_failure(tmp_path: Path) -> None:
    process = start("--steps", "2", "--target", "0.1", "--out", str(tmp_path))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, output
    assert "target: below 0.1" in output


def test_with_adamw_only_one_line_changes(tmp_path: Path) -> None:
    lines = SCRIPT.read_text().splitlines()
    places = [n for n, line in enumerate(lines) if "DisTrO(" in line and not line.lstrip().startswith("#")]
    assert len(places) == 1
    lines[places[0]] = "    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)"
    script = tmp_path / "train_with_adamw.py"
    script.write_text("\n".join(lines))
    process = start("--steps", "12", "--target", "5.3", "--out", str(tmp_path), script=script)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output


@pytest.mark.skipif(sys.platform == "win32", reason="signals to process groups are POSIX")
@pytest.mark.parametrize("whom", ["everybody in the terminal", "the launcher alone"])
def test_ctrl_c_ends_every_worker(running: subprocess.Popen[str], whom: str) -> None:
    if whom == "the launcher alone":
        running.send_signal(signal.SIGINT)
    else:
        os.killpg(running.pid, signal.SIGINT)
    # The output ends when the last process that could write to it has ended.
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in output
    assert "Traceback" not in output


def test_ranks_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from byte_report import Summary

    def ended_with(*hashes: str) -> Summary:
        return Summary(
            workers=len(hashes),
            steps=1,
            seconds=1.0,
            parameters=1,
            first_loss=5.5,
            validation_loss=2.0,
            target=2.4,
            sent_per_step=1.0,
            gradient_bytes=2,
            hashes=hashes,
        )

    assert ended_with("aa", "aa").succeeded
    assert not ended_with("aa", "ab").succeeded
