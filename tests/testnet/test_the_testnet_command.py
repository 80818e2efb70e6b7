"""``distro-optim testnet`` runs a script as several peers, disturbs them, judges how they end, and leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import warm_python
from distro_optim.cli import main
from distro_optim.strategy.environment import RunEnvironment
from distro_optim.testnet import network

pytestmark = [pytest.mark.waiting, pytest.mark.slow]


SCRIPT = Path(__file__).with_name("pretended_training.py")
PATIENCE_SECONDS = 60


def command(out: Path, *options: str, script: tuple[str, ...] = ()) -> list[str]:
    return ["testnet", *options, "--out", str(out), str(SCRIPT), "--", *script]


def records(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def ran(
    out: Path, capsys: pytest.CaptureFixture[str], *options: str, script: tuple[str, ...] = ()
) -> tuple[int, dict[str, Any]]:
    """Exit status and summary."""
    status = main(command(out, "--json", *options, script=script))
    return status, records(capsys.readouterr().out)[-1]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_three_peers_train_and_end_with_equal_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = ran(tmp_path, capsys, "--target", "2.0")
    assert status == 0, summary
    assert summary["succeeded"]
    assert summary["weights_equal_at_the_end"]
    assert summary["rounds_compared"] > 10
    assert summary["rounds_differing"] == 0
    assert [peer["state"] for peer in summary["peers"]] == ["ended"] * 3
    assert all(peer["rounds"] > 10 and peer["bytes_sent"] > 0 and len(peer["key"]) == 64 for peer in summary["peers"])
    # Two peers in a ring pass on as much as the gradients have, in bf16.
    assert all(peer["ddp_bytes"] == peer["rounds"] * 20_000 for peer in summary["peers"])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert summary["plot"] == str(tmp_path / "losses.png")


def test_one_peer_is_killed_another_joins_and_a_killed_one_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = ("--kill", "1@20", "--join-at", "30", "--kill", "2@30", "--restart", "2@40")
    status, summary = ran(tmp_path, capsys, *faults, script=("--steps", "150"))
    assert status == 0, summary
    assert [peer["state"] for peer in summary["peers"]] == ["ended", "killed -9", "ended", "ended"]
    assert summary["peers"][1]["exit_code"] == -signal.SIGKILL
    assert summary["peers"][1]["step"] < 60
    assert [text.split()[1] for text in summary["faults"]] == ["1", "2", "peer", "2"]
    assert summary["weights_equal_at_the_end"]


def test_the_host_is_told_how_many_begin_and_how_few_remain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = ran(tmp_path, capsys, "--kill", "1@5", "--set", "total_steps=70", "--set", "run_id=friends")
    assert status == 0
    told = [line for line in (tmp_path / "peer-0.log").read_text().splitlines() if line.startswith("settings")]
    assert told == ["settings {'peers_to_start': 3, 'min_peers': 2, 'total_steps': 70, 'run_id': 'friends'}"]


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        ((), {"relay": "none"}),
        (("--relay", "default"), {"relay": "default"}),
        (("--iroh-relay", "psyche", "--iroh-discovery", "local"), {"relay": "psyche", "discovery": "local"}),
    ],
)
def test_all_peers_are_told_how_they_reach_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], variables: dict[str, str]
) -> None:
    started: list[RunEnvironment] = []

    class Started:
        pid = 0

        def __init__(self, command: object, environment: dict[str, str], log: object) -> None:
            started.append(RunEnvironment.read(environment))

        def poll(self) -> int:
            return 3

        def interrupt(self) -> None: ...

        def kill(self) -> None: ...

    monkeypatch.setattr(network, "PeerProcess", Started)
    assert main(command(tmp_path, "--json", *options)) == 1
    assert [environment.connection for environment in started] == [variables]


@pytest.mark.parametrize(
    ("options", "script", "problem"),
    [
        (("--target", "0.1"), (), "not below 0.1"),
        ((), ("--differ", "peer 2"), "do not end with the same weights"),
        ((), ("--fail", "peer 1"), "peer 1 ended with status 3"),
        ((), ("--fail-at-once", "peer 0"), "before it had a ticket"),
        ((), ("--fail-at-once", "peer 1", "--steps", "1000000"), "peer 1 ended with status 3"),
        (("--kill", "1@1000"), (), "it did not come to this: peer 1 is killed"),
        (("--timeout", "2"), ("--steps", "1000000"), "not over after 2 s"),
        (("--stall-timeout", "2"), ("--steps", "1000000", "--silent"), "nothing was heard"),
    ],
)
def test_what_goes_wrong_is_a_failure_with_its_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    script: tuple[str, ...],
    problem: str,
) -> None:
    status, summary = ran(tmp_path, capsys, "--peers", "3", *options, script=script)
    assert status == 1
    assert any(problem in text for text in summary["problems"]), summary["problems"]


def test_the_end_of_the_log_of_a_peer_that_failed_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--plain", script=("--fail", "peer 1"))) == 1
    output = capsys.readouterr().out
    assert "this went wrong" in output
    assert "peer 1 has ended with status 3" in output


def test_lines_and_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--plain", "--kill", "1@20")) == 0
    output = capsys.readouterr().out
    for part in ("peer 0 hosts the run", "peer 1 is killed with -9", "equal on all 2", "equal in each", "1 : "):
        assert part in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kill", "3@10"), "no peer of that number is running"),
        (("--kill", "1@10", "--kill", "1@20"), "no peer of that number is running"),
        (("--restart", "1@10"), "was not killed before"),
        (("--kill", "one"), "'one' is not of the form PEER@STEP"),
        (("--set", "total_steps"), "is not of the form NAME=VALUE"),
        (("--peers", "0"), "at least one peer"),
    ],
)
def test_wrong_options_are_explained_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(command(tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_script_that_is_not_there_and_a_folder_that_is_a_file_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["testnet", str(tmp_path / "missing.py")]) == 2
    assert "there is no script" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(command(tmp_path / "file")) == 2
    assert "name another with --out" in capsys.readouterr().err


def test_the_files_of_the_run_before_are_not_taken_for_this_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(tmp_path, capsys, script=("--steps", "60"))[0] == 0
    status, summary = ran(tmp_path, capsys, script=("--steps", "20"))
    assert status == 0
    assert summary["step"] < 20


# -- the end -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(out: Path, *script: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """The command in the middle of a long run, and the numbers of the processes that its peers have started."""
    child = out / "child"
    arguments = command(out, "--json", "--peers", "2", script=("--steps", "1000000", "--child", str(child), *script))
    with warm_python.Popen(
        [sys.executable, "-m", "distro_optim", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal to its group does not reach the tests
    ) as process:
        watchdog = threading.Timer(PATIENCE_SECONDS, process.kill)
        watchdog.start()
        children: list[int] = []
        try:
            assert process.stdout is not None
            for line in process.stdout:
                peers = json.loads(line).get("peers", [])
                if len(peers) == 2 and all(peer["rounds"] for peer in peers):
                    break
            children += [int((out / f"child-peer {number}").read_text()) for number in range(2)]
            yield process, children
        finally:
            watchdog.cancel()
            process.kill()
            for pid in children:  # of peers that were themselves killed with -9
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(
    ("number", "stubborn"), [(signal.SIGINT, False), (signal.SIGTERM, False), (signal.SIGINT, True)]
)
def test_ctrl_c_ends_everything_within_seconds(tmp_path: Path, number: signal.Signals, stubborn: bool) -> None:
    with running(tmp_path, *(("--stubborn",) if stubborn else ())) as (process, children):
        assert all(is_running(pid) for pid in children)
        process.send_signal(number)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 128 + signal.SIGINT
        assert "stopped, and all peers with it" in errors
        assert "Traceback" not in errors
        assert not any(is_running(pid) for pid in children)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends the children of a killed process")
def test_nothing_is_left_when_the_command_itself_is_killed(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _):
        peers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(peers) == 2
        watched = [os.pidfd_open(pid) for pid in peers]
        process.kill()
        process.wait()
        for descriptor in watched:
            ended, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
            os.close(descriptor)
            assert ended
