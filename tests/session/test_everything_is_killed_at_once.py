"""Power cuts and lids of laptops: host and peers are processes that are killed with -9 at once, or stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from distro_optim.strategy.model.between_epochs import FOLDER

from .processes import NUMBERS, Processes

pytestmark = [pytest.mark.waiting, pytest.mark.slow(30)]

# Of waiting for other processes, on a machine that is busy: each loads PyTorch twice.
pytestmark.append(pytest.mark.timeout(600))


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path, 60)
    yield made
    made.kill(*made.running)


def newest_saved(folder: Path) -> int:
    """Step of the newest checkpoint; looks at names alone, since a store tidies up."""
    found = [*folder.glob("step-*"), *(folder / FOLDER).glob("step-*")]
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def test_the_run_goes_on_from_the_newest_round_that_any_of_them_saved(processes: Processes) -> None:
    all_ = processes
    ticket = all_.start_all()
    all_.until(lambda: all_.last_step(1) >= 4, "nobody trains")
    # The first host dies, and the run goes on without it, so that it is behind with what it has saved.
    all_.until(lambda: newest_saved(all_.of(1)) >= 4, "the host saves nothing")
    all_.until(lambda: min(all_.last_step(number) for number in NUMBERS) >= 15, "the run does not go on")
    all_.kill(1)
    died_at = all_.last_step(1)
    all_.until(lambda: max(newest_saved(all_.of(n)) for n in (2, 3)) > died_at + 2, "nobody took over")
    all_.kill(2, 3)
    newest = max(newest_saved(all_.of(number)) for number in NUMBERS)
    assert newest > newest_saved(all_.of(1))

    before = {number: len(all_.trained(number)) for number in NUMBERS}
    all_.start(1)
    for number in (2, 3):
        all_.start(number, ticket)
    all_.until(lambda: all(process.poll() is not None for process in all_.running.values()), "the run does not end")
    again = {number: all_.trained(number)[before[number] :] for number in NUMBERS}
    assert {lines[-1] for lines in again.values()} == {("end", again[1][-1][1])}
    assert min(int(lines[0][0]) for lines in again.values()) >= newest
    assert "the run goes on from that one" in all_.said(1)


def test_while_a_peer_sleeps_the_others_go_on_and_only_that_one_loads_a_model_when_it_wakes(
    processes: Processes,
) -> None:
    all_ = processes
    all_.start_all()
    all_.until(lambda: min(all_.last_step(number) for number in NUMBERS) >= 4, "nobody trains")
    loaded = {number: all_.said(number).count("the model comes from peers: 100 %") for number in NUMBERS}
    slept_at = all_.last_step(3)
    all_.stop(3)
    all_.until(lambda: min(all_.last_step(number) for number in (1, 2)) >= slept_at + 8, "the others do not go on")
    all_.wake(3)
    all_.until(lambda: all(process.poll() is not None for process in all_.running.values()), "the run does not end")
    ends = {all_.trained(number)[-1] for number in NUMBERS}
    assert len(ends) == 1
    assert ends.pop()[0] == "end"
    for number in (1, 2):
        assert all_.said(number).count("the model comes from peers: 100 %") == loaded[number]
        assert "loading them again" not in all_.said(number)
    assert all_.said(3).count("the model comes from peers: 100 %") == loaded[3] + 1
