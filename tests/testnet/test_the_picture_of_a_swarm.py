"""Reports of many peers make one picture: sums, equality of weights, losses, a table."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from distro_optim.console import LivePicture, PlainLines, display_for, make_console
from distro_optim.errors import ConfigurationError
from distro_optim.strategy.run_report import ENDED, JOINED, ROUND, ReportLine
from distro_optim.testnet.display import FORMS, Situation, in_words, render, status_line
from distro_optim.testnet.faults import FaultPlan, Join, Kill, Restart
from distro_optim.testnet.network import Outcome, parse_setting
from distro_optim.testnet.summary import summary_table
from distro_optim.testnet.watching import COMPARED_ROUNDS, PeerState, SwarmWatch

pytestmark = pytest.mark.waiting


def swarm(peers: int) -> SwarmWatch:
    watch = SwarmWatch()
    for _ in range(peers):
        watch.add_peer()
    return watch


def tell(watch: SwarmWatch, number: int, kind: str = ROUND, **facts: Any) -> None:
    watch.take(watch.peers[number], ReportLine(kind=kind, peer=f"{number:064x}", **facts))


def test_rounds_in_which_two_peers_had_other_weights_are_counted() -> None:
    watch = swarm(3)
    for step in range(1, 6):
        for number in range(3):
            tell(watch, number, step=step, weights_hash="odd" if step == 3 and number == 1 else "right")
    tell(watch, 0, step=6, weights_hash="alone")
    comparison = watch.comparison
    assert (comparison.compared, comparison.differing, comparison.first_differing) == (5, 1, 3)


def test_a_run_without_end_is_counted_in_bounded_memory() -> None:
    watch = swarm(2)
    steps = 3 * COMPARED_ROUNDS
    for step in range(1, steps + 1):
        for number in range(2):
            tell(watch, number, step=step, weights_hash=f"{number}" if step == 7 else "right")
    assert len(watch._hashes) <= COMPARED_ROUNDS + 1
    comparison = watch.comparison
    assert (comparison.compared, comparison.differing, comparison.first_differing) == (steps, 1, 7)


def test_what_a_peer_sent_before_it_was_started_again_counts() -> None:
    watch = swarm(1)
    peer = watch.peers[0]
    tell(watch, 0, step=5, bytes_sent=100, bytes_received=10, ddp_bytes=1000, seconds_training=2.0, seconds_waiting=1.0)
    peer.state = PeerState.KILLED
    assert watch.survivors == []
    peer.restarted()
    assert peer.state is PeerState.STARTING
    tell(watch, 0, kind=JOINED)
    tell(watch, 0, step=9, bytes_sent=50, bytes_received=5, ddp_bytes=500, seconds_training=1.0, seconds_waiting=0.5)
    assert [peer.state for peer in watch.peers] == [PeerState.RUNNING]
    assert (peer.bytes_sent, peer.bytes_received, peer.ddp_bytes) == (150, 15, 1500)
    assert (peer.seconds_training, peer.seconds_waiting, peer.rounds) == (3.0, 1.5, 2)
    assert watch.survivors == [peer]


def test_only_those_who_are_left_must_end_alike() -> None:
    watch = swarm(3)
    tell(watch, 0, kind=ENDED, weights_hash="right")
    assert not watch.equal_at_the_end
    tell(watch, 1, kind=ENDED, weights_hash="other")
    tell(watch, 2, kind=ENDED, weights_hash="right")
    assert not watch.equal_at_the_end
    watch.peers[1].state = PeerState.KILLED
    assert watch.equal_at_the_end


def test_the_loss_at_the_end_is_that_of_the_last_rounds_of_those_who_were_in_them() -> None:
    watch = swarm(3)
    for step in range(1, 101):
        tell(watch, 0, step=step, loss=1.0 if step > 50 else 9.0)
        tell(watch, 1, step=step, loss=2.0 if step > 50 else 9.0)
        if step < 50:
            tell(watch, 2, step=step, loss=9.0)
    assert watch.final_loss == pytest.approx(1.5)
    assert swarm(1).final_loss is None


def test_the_table_shows_peers_events_and_differences_without_control_characters() -> None:
    watch = swarm(2)
    tell(watch, 0, step=41, loss=2.5, run_state="ROUND_TRAIN", bytes_sent=2000, ddp_bytes=800_000, weights_hash="abcd")
    tell(watch, 1, step=41, loss=2.25, weights_hash="ef01")
    watch.events.append("12:00:00 \x1b]0;owned\x07")
    stream = io.StringIO()
    Console(file=stream, width=80).print(render(Situation(watch, 12.0)))
    text = stream.getvalue()
    for part in (
        "ROUND_TRAIN",
        "step 41",
        "12 s",
        "2.500",
        "2.250",
        "2.0 kB",
        "800.0 kB",
        "differed in 1 of 1",
    ):
        assert part in text
    assert "\x1b" not in text


def test_it_says_how_far_the_run_is_and_for_how_long_it_goes_on() -> None:
    watch = swarm(2)
    assert status_line(Situation(watch, 0.0)).startswith("step 0  ")
    tell(watch, 0, JOINED, total_steps=600)
    for step in range(1, 101):
        tell(watch, 0, step=step, total_steps=600, time=1000.0 + (2 * step if step > 40 else 0))
    tell(watch, 1, step=100, total_steps=600, time=5000.0)
    assert watch.seconds_left == 1000.0
    assert status_line(Situation(watch, 0.0)).startswith("step 100 of 600, about 17 min left  ")
    # The rounds after the last, in which the last results are applied, are not what anybody asked for.
    for step in range(101, 603):
        tell(watch, 0, step=step, total_steps=600, loss=1.0, weights_hash="same")
    tell(watch, 0, ENDED, step=603, total_steps=600, weights_hash="end")
    stream = io.StringIO()
    outcome = Outcome(watch=watch, seconds=300.0, faults=(), problems=(), target=None)
    Console(file=stream, width=100).print(render(Situation(watch, 300.0)), summary_table(outcome))
    text = stream.getvalue()
    assert "step 600 of 600   2 peers" in text
    assert "600 in 300 s" in text
    assert "5 min" in text
    assert not re.search("60[1-9]|left", text.replace("that are left", ""))


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (150, "2 min"), (5400, "1.5 h")])
def test_times_are_told_in_words(seconds: float, said: str) -> None:
    assert in_words(seconds) == said


def test_in_a_terminal_the_table_is_redrawn_and_elsewhere_lines_are_printed() -> None:
    stream = io.StringIO()
    watch = swarm(1)
    with LivePicture(FORMS, make_console(stream, force_terminal=True, width=160)) as display:
        tell(watch, 0, step=3, loss=2.5)
        display.update(Situation(watch, 1.0))
    assert "0 host" in stream.getvalue()
    assert isinstance(display_for("tui", FORMS, io.StringIO()), PlainLines)


def test_faults_come_once_and_in_the_order_of_their_steps() -> None:
    faults: list[Kill | Restart | Join] = [
        Restart(peer=1, step=50),
        Kill(peer=1, step=20),
        Join(step=30),
        Kill(peer=3, step=60),
    ]
    plan = FaultPlan(faults, peers=3)
    assert plan.fewest_peers == 2
    assert plan.due(19) == []
    assert plan.due(30) == [Kill(peer=1, step=20), Join(step=30)]
    assert plan.due(30) == []
    assert plan.pending == (Restart(peer=1, step=50), Kill(peer=3, step=60))


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("total_steps=200", ("total_steps", 200)),
        ("run_id=friends", ("run_id", "friends")),
        ("joiner_wait_time=null", ("joiner_wait_time", None)),
        ("save_dir=a=b", ("save_dir", "a=b")),
    ],
)
def test_a_setting_is_json_or_a_word(text: str, setting: tuple[str, Any]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["", "total_steps", "=3", "total_steps=", "total steps=3"])
def test_anything_else_is_no_setting(text: str) -> None:
    with pytest.raises(ConfigurationError, match="NAME=VALUE"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("ends", "said"),
    [(("", ""), "not known"), (("a", ""), "not known"), (("a", "b"), "they DIFFER"), (("a", "a"), "equal")],
)
def test_weights_of_a_script_that_broke_are_not_said_to_differ(ends: tuple[str, str], said: str) -> None:
    watch = swarm(2)
    for number, weights in enumerate(ends):
        if weights:
            tell(watch, number, ENDED, weights_hash=weights)
    console = Console(width=120, file=io.StringIO())
    console.print(summary_table(Outcome(watch=watch, seconds=1.0, faults=(), problems=(), target=None)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    line = next(line for line in text.splitlines() if "weights of the peers that are left" in line)
    assert said in line


@pytest.mark.parametrize("with_peers", [True, False])
def test_the_summary_leaves_out_the_table_that_the_live_picture_has_left(with_peers: bool) -> None:
    watch = swarm(2)
    tell(watch, 0, step=41, loss=2.5)
    stream = io.StringIO()
    outcome = Outcome(watch=watch, seconds=1.0, faults=(), problems=("peer 1 is late",), target=None)
    Console(width=120, file=stream).print(summary_table(outcome, with_peers=with_peers))
    assert ("0 host" in stream.getvalue()) is with_peers
    assert "41 in 1 s" in stream.getvalue()
    assert "peer 1 is late" in stream.getvalue()
