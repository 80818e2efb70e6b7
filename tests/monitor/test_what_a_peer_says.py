"""A peer says how it gets into a run, who comes and who leaves, and at the end what remains of it."""

from __future__ import annotations

from dataclasses import replace

from distro_optim.coordinator.rules.outlook import waits_for
from distro_optim.coordinator.rules.steps import counted_steps
from distro_optim.coordinator.types import Client, ClientState, NodeIdentity, RunState
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.monitor.narration import Narration
from distro_optim.strategy.monitor.summary import summary
from distro_optim.strategy.network.contributions import MAX_IDENTITIES, Contributions
from distro_optim.strategy.network.journal import Journal
from distro_optim.strategy.port import Contribution, RunView
from distro_optim.strategy.rounds.actions import CountedResult, DropReason

ME, A, B, C, D = (bytes([number] * 32) for number in range(5))
VIEW = RunView(run_id="run", run_state="ROUND_TRAIN", step=40, total_steps=120, connected=True, gives_up_after=900)


class Listener:
    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[str] = []
        self.narration = Narration(self.told.append, lambda: self.now)

    def among(self, *others: bytes, **facts: object) -> RunView:
        clients = (*others, ME)
        return replace(VIEW, clients=clients, num_peers=len(clients), **facts)  # type: ignore[arg-type]

    def heard(self) -> list[str]:
        told = list(self.told)
        self.told.clear()
        return told


def test_a_joiner_says_what_it_found_what_it_waits_for_and_that_it_is_in() -> None:
    listener = Listener()
    narration = listener.narration
    narration.found(replace(VIEW, num_peers=1))
    assert listener.heard() == ["found the run 'run': step 40 of 120, 1 peer in it"]
    waiting = replace(VIEW, clients=(A,), num_peers=1, waits_for="the next epoch")
    narration.look(waiting, ME)
    narration.look(waiting, ME)
    assert listener.heard() == ["waiting for the next epoch"]
    listener.now = 20.0
    narration.look(waiting, ME)
    assert listener.heard() == ["waiting for the next epoch; 20 s so far"]
    for now, done in ((20.0, 1), (20.5, 2), (22.5, 40), (22.6, 100)):
        listener.now = now
        narration.downloaded(done, 100)
    assert listener.heard() == [f"the model comes from peers: {percent} %" for percent in (1, 40, 100)]
    narration.entered(listener.among(A, B), 46, is_host=False)
    narration.entered(listener.among(A, B), 47, is_host=False)
    assert listener.heard() == ["in the run with 2 peers, from step 46 of 120"]


def test_a_coordinator_that_is_gone_is_told_of_at_once_with_seconds_and_when_it_is_back() -> None:
    listener = Listener()
    narration = listener.narration
    narration.look(listener.among(connected=False), ME)
    assert listener.heard() == []  # there was no link yet that could be lost
    narration.look(listener.among(), ME)
    for now in (100.0, 101.0, 116.0, 120.0):
        listener.now = now
        narration.look(listener.among(connected=False, waits_for="members"), ME)
    assert listener.heard() == [
        "the coordinator does not answer: we keep the weights, call it again for up to 900 s (give_up_seconds), and "
        "train on when it is back",
        "no link to the coordinator for 16 s; we wait 884 s more",
    ]
    narration.look(listener.among(), ME)
    assert listener.heard() == ["the coordinator answers again, after 20 s"]


def test_peers_that_cannot_be_reached_are_told_of_within_ten_seconds_with_what_to_type() -> None:
    listener = Listener()
    narration = listener.narration
    for listener.now in (0.0, 5.0, 9.0, 12.0):
        narration.look(listener.among(A, B), ME)
    (said,) = listener.heard()
    assert said.startswith("for 9 s none of the 2 peers besides us can be reached. ")
    assert "--iroh-discovery local" in said
    assert "--peer" in said
    narration.look(listener.among(A, B, neighbors=1), ME)
    assert listener.heard() == ["a peer is reached, after 12 s"]
    for listener.now in (20.0, 40.0):
        narration.look(listener.among(), ME)
    assert listener.heard() == ["peers 01010101, 02020202 left: 1 peer now"]  # alone, there is nobody to be reached


def test_a_round_that_waits_for_others_is_told_of_now_and_then() -> None:
    listener = Listener()
    narration = listener.narration
    for listener.now, height in ((0.0, 7), (10.0, 7), (14.0, 8), (28.0, 8), (30.0, 8), (40.0, 8), (46.0, 8), (50.0, 9)):
        narration.look(listener.among(A, B, neighbors=1, height=height), ME)
    assert listener.heard() == [
        "step 40: waiting for the others; 16 s so far",
        "step 40: waiting for the others; 32 s so far",
    ]
    for listener.now in (60.0, 90.0, 120.0):
        narration.look(listener.among(height=10), ME)
    assert listener.heard() == ["peers 01010101, 02020202 left: 1 peer now"]  # alone, there is nobody to wait for


def test_who_comes_and_who_leaves_is_said_once() -> None:
    listener = Listener()
    narration = listener.narration
    narration.entered(listener.among(), 1, is_host=True)
    assert listener.heard() == []
    narration.look(listener.among(waiting_peers=1), ME)
    narration.look(listener.among(waiting_peers=1), ME)
    assert listener.heard() == ["1 peer joined and will be in the next epoch"]
    narration.look(listener.among(A, B, C, D), ME)
    narration.look(listener.among(A), ME)
    assert listener.heard() == [
        "peers 01010101, 02020202, 03030303 and 1 more came: 5 peers now",
        "peers 02020202, 03030303, 04040404 left: 2 peers now",
    ]
    # Between two epochs the list means nothing.
    narration.look(listener.among(run_state="WAITING_FOR_MEMBERS"), ME)
    assert listener.heard() == []


def test_who_falls_out_of_an_epoch_says_when_it_is_back() -> None:
    listener = Listener()
    listener.narration.entered(listener.among(A), 5, is_host=False)
    listener.heard()
    listener.narration.look(replace(VIEW, clients=(A,), num_peers=1, waits_for="the next epoch"), ME)
    listener.narration.entered(listener.among(A), 9, is_host=False)
    assert listener.heard() == ["waiting for the next epoch", "in the run with 1 peer, from step 9 of 120"]


def test_as_many_steps_are_said_as_were_asked_for() -> None:
    state = RunConfig(total_steps=20, global_batch_size=4).coordinator_state("run")
    assert counted_steps(state) == (state.progress.step, 20)
    over = replace(state, progress=replace(state.progress, step=state.config.total_steps))
    assert counted_steps(over) == (20, 20)
    of_psyche = replace(over, config=replace(over.config, round_witness_time=5))
    assert counted_steps(of_psyche) == (of_psyche.config.total_steps,) * 2


def test_a_joiner_hears_when_a_run_of_a_script_lets_it_in() -> None:
    state = RunConfig(total_steps=20, global_batch_size=4).coordinator_state("run")
    clients = (Client(NodeIdentity.from_single_key(A), ClientState.HEALTHY, 0),)
    begun = replace(
        state, run_state=RunState.ROUND_TRAIN, epoch_state=replace(state.epoch_state, clients=clients, last_step=0)
    )
    me = NodeIdentity.from_single_key(ME)
    said = waits_for(begun, me, 0)
    assert said is not None
    assert said.startswith("the next epoch, usually within 20 s: 1 client is in epoch 0")
    ending = replace(begun, epoch_state=replace(begun.epoch_state, last_step=9))
    assert (waits_for(ending, me, 0) or "").startswith("the next epoch, after step 9: 1 client is in epoch 0")


def test_a_host_says_how_many_it_waits_for_and_when_they_are_here() -> None:
    state = RunConfig(total_steps=20, global_batch_size=4).coordinator_state("run")
    me = NodeIdentity.from_single_key(ME)
    assert waits_for(state, me, 0, missing=0) is None, "the host is all that the run needs"
    assert waits_for(state, me, 0, missing=2) == "2 more peers to begin with"
    listener = Listener()
    waiting = replace(VIEW, run_state="WAITING_FOR_MEMBERS", waits_for=waits_for(state, me, 0, missing=1))
    listener.narration.look(waiting, ME)
    listener.narration.look(listener.among(A), ME)
    listener.narration.entered(listener.among(A), 1, is_host=True)
    assert listener.heard() == ["waiting for 1 more peer to begin with", "in the run with 1 peer, from step 1 of 120"]


def test_a_host_to_which_nobody_came_hears_of_the_setting_that_waits() -> None:
    alone = replace(VIEW, run_state="FINISHED", rounds_trained=9, contributions={ME: Contribution(rounds=9)})
    (said,) = [line for line in summary(alone, is_host=True).splitlines() if "peers_to_start=2" in line]
    assert said.startswith("  others        none came in time")
    together = replace(alone, contributions={**alone.contributions, A: Contribution(rounds=1)})
    for view, is_host in ((together, True), (alone, False), (replace(alone, rounds_trained=0), True)):
        assert "peers_to_start" not in summary(view, is_host=is_host)


def test_what_remains_of_a_run() -> None:
    view = replace(
        VIEW,
        run_state="FINISHED",
        rounds_trained=118,
        bytes_sent=1_500_000,
        bytes_received=20_000,
        seconds_training=30.0,
        seconds_waiting=4.0,
        weights_root=bytes(32),
        weights_step=122,
        contributions={ME: Contribution(rounds=118), A: Contribution(rounds=3), B: Contribution(dropped=1)},
    )
    assert summary(view, ddp_bytes=800_000_000).splitlines() == [
        "the run 'run' is finished",
        "  trained here  118 rounds; results of 2 peers counted",
        "  sent          1.5 MB in place of 800.0 MB of gradients; received 20.0 kB",
        "  time          30 s training, 4 s waiting for the run",
        "  weights       0000000000000000 after step 120",
    ]
    left = replace(view, run_state="ROUND_TRAIN", weights_step=40)
    assert summary(left).splitlines()[-1] == "  weights       0000000000000000 at the start of step 40"
    assert summary(replace(VIEW, fault="too late")).splitlines()[0] == "the run 'run' was left at step 40 of 120"
    assert summary(replace(VIEW, fault="too late")).splitlines()[-1] == "  in doubt      too late"


def test_contributions_are_counted_by_identity_and_bounded() -> None:
    contributions = Contributions()
    for _ in range(2):
        contributions.counted(
            [CountedResult(owner=A, samples=4, bytes=100), CountedResult(owner=B, samples=2, bytes=9)]
        )
    contributions.dropped(A, DropReason.WRONG_HASH)
    for reason in (DropReason.DUPLICATE, DropReason.WRONG_STEP, DropReason.NOT_RUNNING):
        contributions.dropped(A, reason)
    assert contributions.seen() == {
        A: Contribution(rounds=2, samples=8, bytes=200, dropped=1),
        B: Contribution(rounds=2, samples=4, bytes=18),
    }
    for number in range(2 * MAX_IDENTITIES):
        contributions.dropped(number.to_bytes(32, "big"), DropReason.MALFORMED)
    assert len(contributions.seen()) == MAX_IDENTITIES
    assert {A, B} <= contributions.seen().keys()


def test_a_speed_is_told_from_the_first_round_on_that_was_seen_as_a_whole() -> None:
    listener = Listener()
    journal = Journal("run", NodeIdentity(signer=ME, p2p_identity=ME), lambda: listener.now)
    state = RunConfig(total_steps=9, global_batch_size=16).coordinator_state("run")
    state = replace(state, run_state=RunState.ROUND_TRAIN)
    speeds = []
    for now, step in ((0.005, 3), (2.0, 4), (6.0, 5)):
        listener.now = now
        journal.state(replace(state, progress=replace(state.progress, step=step)))
        speeds.append(journal.metadata(step).tokens_per_sec)
    assert speeds[0] == 0
    assert speeds[2] * 4.0 == speeds[1] * 1.995 > 0
