"""Saved runs: whole or not at all, whatever kills the server, and one server to a run."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import warm_python
from distro_optim.coordinator.formats.text import to_toml
from distro_optim.coordinator.server.store import KEPT_FILES, StateStore, read_state_file
from distro_optim.coordinator.types import Client, Coordinator, CoordinatorEpochState, Round
from distro_optim.errors import ConfigurationError
from runs import client, waiting_run

pytestmark = pytest.mark.waiting


RUN = "org/my run: π"

# Saves one step after the other as fast as it can, and says each time when a save is complete.
WRITER = """
import sys
from dataclasses import replace
sys.path[:0] = {paths!r}
from coordinator.test_state_store import RUN, at_step
from distro_optim.coordinator.server.store import StateStore
with StateStore({directory!r}, RUN) as store:
    print("ready", flush=True)
    for step in range({start}, 1_000_000):
        store.save(at_step(step))
        print(step, flush=True)
"""


def at_step(step: int) -> Coordinator:
    """A state of a few hundred kilobytes of text, so that writing it takes a while."""
    state = waiting_run(RUN)
    members = tuple(Client(client(number)) for number in range(100))
    epoch = CoordinatorEpochState(rounds=(Round(random_seed=2**64 - step),) * 4, clients=members)
    return replace(state, progress=replace(state.progress, step=step), epoch_state=epoch)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN) as store:
        assert store.load() is None
        for step in (1, 9, 10, 100):
            store.save(at_step(step))
        assert store.load() == at_step(100)
    with StateStore(tmp_path, RUN) as store:
        assert store.load() == at_step(100)


def test_file_names_say_run_and_step_and_leave_the_folder_never(tmp_path: Path) -> None:
    with StateStore(tmp_path, "../../etc/run") as store:
        path = store.save(replace(waiting_run("../../etc/run"), run_id="../../etc/run"))
    assert path.parent == tmp_path
    assert path.name == "..%2F..%2Fetc%2Frun-step0.toml"


def test_the_last_few_steps_stay(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN) as store:
        for step in range(1, 12):
            store.save(at_step(step))
        assert [path.stem.rpartition("-")[2] for path in store.files()] == ["step7", "step8", "step9", "step10"]
        store.save(at_step(11))
        assert len(store.files()) == KEPT_FILES


def test_runs_share_a_folder_without_mixing(tmp_path: Path) -> None:
    with StateStore(tmp_path, "run") as first, StateStore(tmp_path, "run-step7") as second:
        first.save(replace(waiting_run(), run_id="run"))
        assert second.load() is None
        second.save(replace(waiting_run(), run_id="run-step7"))
        assert [path.name for path in first.files()] == ["run-step0.toml"]


def test_a_run_goes_on_only_if_asked_to_and_nothing_saved_is_lost_unasked(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN) as store:
        assert store.to_resume(at_step(1), resume=True, advice="") is None
        store.save(at_step(7))
        assert store.to_resume(at_step(1), resume=True, advice="") == at_step(7)
        assert store.to_resume(at_step(7), resume=False, advice="") is None
        with pytest.raises(ConfigurationError, match=r"at step 7, after step 1 with which .* begin: do this") as caught:
            store.to_resume(at_step(1), resume=False, advice="do this")
        assert caught.value.name == "save_dir"


def test_two_servers_cannot_keep_one_run_in_one_folder(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN), pytest.raises(ConfigurationError, match="another server keeps run"):
        StateStore(tmp_path, RUN)
    StateStore(tmp_path, RUN).close()


def test_a_wrong_file_is_named_and_nothing_older_taken_in_its_place(tmp_path: Path) -> None:
    with StateStore(tmp_path, RUN) as store:
        store.save(at_step(1))
        newest = store.save(at_step(2))
        newest.write_text(newest.read_text().replace('run_state = "WaitingForMembers"', 'run_state = "Sleeping"'))
        with pytest.raises(ConfigurationError, match=r"step1\.toml: .*run_state"):
            store.load()
        newest.write_text(to_toml(replace(at_step(2), run_id="other")))
        with pytest.raises(ConfigurationError, match="is of run 'other'"):
            store.load()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"run_id = ", b"", b"[config]\n"])
def test_a_file_that_is_no_state_is_a_configuration_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"state\.toml"):
        read_state_file(path)
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_state_file(tmp_path / "nowhere.toml")


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot use"):
        StateStore(tmp_path / "file" / "folder", RUN)
    with pytest.raises(ConfigurationError, match="it is a file; name a folder"):
        StateStore(tmp_path / "file", RUN)


@pytest.mark.slow
def test_killed_at_any_moment_the_last_complete_save_is_there(tmp_path: Path) -> None:
    reached, start = 0, 1
    for round_ in range(8):
        code = WRITER.format(paths=[str(Path(__file__).parents[1])], directory=str(tmp_path), start=start)
        with warm_python.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the lock of a killed server is still held"
            for _ in range(round_ % 4 + 1):
                reached = int(process.stdout.readline())
            # Somewhere in the middle of the next save, at another place each time.
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().split()
            reached = max([reached, *map(int, rest)])
        with StateStore(tmp_path, RUN) as store:
            state = store.load()
            assert state is not None
            assert state.progress.step in (reached, reached + 1)
            assert state == at_step(state.progress.step)
            assert not list(tmp_path.glob("*.tmp"))
        start = state.progress.step + 1
