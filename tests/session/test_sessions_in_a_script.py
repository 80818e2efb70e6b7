"""How a session behaves towards the script: steps, schedules, mistakes, reports, and its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, ReduceLROnPlateau, SequentialLR

from distro_optim import DisTrO
from distro_optim.coordinator.model import ConstantLR
from distro_optim.errors import ConfigurationError, DistroError, RunError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.environment import PEER_NAME, REPORT, TICKET_FILE
from distro_optim.strategy.model.schedules import FollowingSchedulers
from distro_optim.strategy.round import Round
from distro_optim.strategy.session import SwarmSession
from frameworks.quiet_run import QuietRun

from .scripts import LR, SAMPLES, Script, equal_weights, new_model, new_optimizer, samples
from .world import SessionWorld, SimulatedPort

MakeWorld = Callable[..., SessionWorld]
ALONE = {"total_steps": 8, "epoch_time": 200, "init_min_clients": 1, "min_clients": 1}


def run_alone(make_world: MakeWorld, script: Callable[[SimulatedPort], None]) -> SimulatedPort:
    world = make_world(**ALONE)
    port = world.port(1)
    world.run(port, script)
    world.until_all_ended()
    return port


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_loop_that_knows_only_optimizer_step_trains_just_as_well(make_world: MakeWorld) -> None:
    losses: list[float] = []

    def with_steps(port: SimulatedPort) -> None:
        model = new_model()
        optimizer, data = new_optimizer(model), samples(torch.float32)
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            while (round_ := session.next_round()) is not None:
                x = data[round_.indices]

                def closure(x: torch.Tensor = x) -> float:
                    optimizer.zero_grad()
                    loss: torch.Tensor = (model(x) - x.flip(1)).pow(2).mean()
                    loss.backward()
                    return loss.item()

                losses.append(optimizer.step(closure))
                assert not round_.open
                assert session.round is None
                with pytest.raises(DistroError, match=r"outside of a round.*session\.next_round"):
                    optimizer.step()
        optimizer.step()  # the session is over: the optimizer steps on its own again

    port = run_alone(make_world, with_steps)
    assert list(port.losses.values()) == losses
    assert len(losses) == 7
    assert losses[-1] < losses[0]


def test_gradients_that_are_not_finite_are_told_of_and_less_often_later(make_world: MakeWorld) -> None:
    told: list[str] = []

    def diverged(port: SimulatedPort) -> None:
        model = new_model()
        data = samples(torch.float32)
        with SwarmSession(
            model, new_optimizer(model), port=port, dataset_size=SAMPLES, on_event=told.append
        ) as session:
            for round_ in session.rounds():
                loss = model(data[round_.indices]).pow(2).mean() * float("nan" if round_.step != 3 else "1")
                loss.backward()
                round_.finish(loss)

    run_alone(make_world, diverged)
    told = [text for text in told if "not finite" in text]
    assert [text.partition(":")[0] for text in told] == ["step 1", "step 2", "step 5"]
    assert "with a loss of nan" in told[0]
    assert "it is round 4 of this kind" in told[-1]


def test_a_model_of_which_nothing_is_to_be_trained_is_refused() -> None:
    model = new_model()
    optimizer = new_optimizer(model)
    model.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing to train"):
        SwarmSession(model, optimizer)


def test_a_round_that_is_left_open_is_finished_by_the_next(make_world: MakeWorld) -> None:
    def careless(port: SimulatedPort) -> None:
        model = new_model()
        data = samples(torch.float32)
        with SwarmSession(model, new_optimizer(model), port=port, dataset_size=SAMPLES) as session:
            for round_ in session.rounds():
                model(data[round_.indices]).pow(2).mean().backward()
                kept.append(round_)

    kept: list[Round] = []
    run_alone(make_world, careless)
    assert len(kept) == 7
    assert not any(round_.open for round_ in kept)
    assert not kept[0].finish(), "once is enough"


def test_parameters_may_wait_in_a_group_of_their_own_but_not_come_later(make_world: MakeWorld) -> None:
    moved: list[bool] = []

    def thaws(port: SimulatedPort) -> None:
        model = nn.Sequential(new_model(), new_model())
        optimizer = DisTrO([{"params": model[0].parameters()}, {"params": model[1].parameters()}], lr=LR)
        schedule = LambdaLR(optimizer, [lambda step: 1.0, lambda step: float(step >= 4)])
        data = samples(torch.float32)
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            session.follow(schedule)
            for round_ in session.rounds():
                with pytest.raises(DistroError, match="settled when it begins"):
                    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
                before = [parameters_to_vector(part.parameters()).detach().clone() for part in model]
                (model(data[round_.indices]) - 1).pow(2).mean().backward()
                round_.finish()
                after = [parameters_to_vector(part.parameters()) for part in model]
                moved.append(not torch.equal(before[1], after[1]))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})

    run_alone(make_world, thaws)
    assert not any(moved[:4])
    assert any(moved[4:])


@pytest.mark.parametrize("takes_step", [False, True], ids=["finish", "step"])
def test_hooks_of_the_step_are_called_once_for_each_round(make_world: MakeWorld, takes_step: bool) -> None:
    calls: list[str] = []

    def with_hooks(port: SimulatedPort) -> None:
        model = new_model()
        data, optimizer = samples(torch.float32), new_optimizer(model)
        optimizer.register_step_pre_hook(lambda *_: calls.append(f"pre {optimizer.param_groups[0]['lr'] > 0}"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            for round_ in session.rounds():
                model(data[round_.indices]).pow(2).mean().backward()
                if round_.step == 2:
                    round_.skip()
                elif takes_step:
                    optimizer.step()
                else:
                    round_.finish()

    run_alone(make_world, with_hooks)
    assert calls == ["pre True", "post"] * 6, "seven rounds, of which one is skipped"


def test_micro_batches_cover_the_share_and_end_early_when_it_is_cancelled(make_world: MakeWorld) -> None:
    def script(port: SimulatedPort) -> None:
        model = new_model()
        with SwarmSession(model, new_optimizer(model), port=port, dataset_size=SAMPLES) as session:
            for round_ in session.rounds():
                pieces = list(round_.micro_batches(3))
                assert [len(piece) for piece in pieces] == [3, 3, 2]
                assert list(chain(*pieces)) == round_.indices
                assert len(round_.batch) == 8
                walk = round_.micro_batches(1)
                next(walk)
                port.compute(100, round_.step)
                assert round_.cancelled
                assert list(walk) == []
                assert not round_.finish()
                with pytest.raises(ConfigurationError, match="at least 1"):
                    list(round_.micro_batches(0))
                break

    world = make_world(**ALONE)
    world.run(world.port(1), script)
    world.until(lambda _: world.ports[0].ended, steps=200)


def test_without_the_length_of_the_dataset_there_are_only_the_coordinators_indices(make_world: MakeWorld) -> None:
    def script(port: SimulatedPort) -> None:
        model = new_model()
        with SwarmSession(model, new_optimizer(model), port=port) as session:
            for round_ in session.rounds():
                assert len(round_.batch) == 8
                with pytest.raises(ConfigurationError, match=r"dataset_size=len\(dataset\)"):
                    _ = round_.indices

    run_alone(make_world, script)


def test_an_error_in_the_loop_leaves_the_true_weights(make_world: MakeWorld) -> None:
    seen: list[list[torch.Tensor]] = []

    def script(port: SimulatedPort) -> None:
        model = new_model()
        optimizer, data = new_optimizer(model), samples(torch.float32)
        with SwarmSession(model, optimizer, port=port, dataset_size=SAMPLES) as session:
            for round_ in session.rounds():
                if round_.step == 4:
                    ahead = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
                    seen.append([optimizer.state[p]["weight"].clone() for p in optimizer.param_groups[0]["params"]])
                    seen.append(ahead)
                    try:
                        raise KeyError("a mistake")
                    finally:
                        session.close()
                        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
                model(data[round_.indices]).pow(2).mean().backward()

    world = make_world(**ALONE)
    world.run(world.port(1), script)
    with pytest.raises(KeyError, match="a mistake"):
        world.until_all_ended()
    true, ahead, after = seen
    assert all(torch.equal(a, b) for a, b in zip(true, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(ahead, after, strict=True))


# -- schedules -------------------------------------------------------------------------------------------------------


def rate_after(make: Callable[[DisTrO], Any], steps: list[int]) -> list[float]:
    optimizer = DisTrO(nn.Linear(3, 3).parameters(), lr=1.0)
    follow = FollowingSchedulers([make(optimizer)])
    rates = []
    for step in steps:
        follow(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize(
    "make",
    [
        lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
        lambda o: CosineAnnealingLR(o, 20),
        lambda o: SequentialLR(o, [LinearLR(o, 0.1, 1, 5), CosineAnnealingLR(o, 20)], [5]),
    ],
)
def test_a_schedule_gives_the_same_rate_however_its_step_was_reached(make: Callable[[DisTrO], Any]) -> None:
    straight = rate_after(make, list(range(1, 13)))
    assert rate_after(make, [12])[-1] == straight[-1]
    assert rate_after(make, [1, 12, 5, 12]) == [straight[0], straight[11], straight[4], straight[11]]


def test_a_schedule_of_more_than_the_step_is_refused() -> None:
    optimizer = DisTrO(nn.Linear(3, 3).parameters())
    with pytest.raises(ConfigurationError, match="ReduceLROnPlateau cannot follow a run"):
        FollowingSchedulers([ReduceLROnPlateau(optimizer)])


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_size": 0}, "a run needs samples"),
        ({"resume": True}, "give checkpoint_dir"),
        ({"learning_rates": "mine"}, 'give "script", "run" or None'),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_opened(settings: dict[str, Any], message: str) -> None:
    model = new_model()
    with pytest.raises(ConfigurationError, match=message):
        SwarmSession(model, new_optimizer(model), **settings)


@pytest.mark.parametrize("hosts", [True, False])
def test_a_dataset_shorter_than_a_round_is_refused(hosts: bool) -> None:
    config, model = RunConfig(total_steps=5, global_batch_size=256), new_model()
    port = None if hosts else QuietRun(config)
    settings = {"config": config, "relay": "none"} if hosts else {"port": port}
    session = SwarmSession(model, new_optimizer(model), dataset_size=10, **settings)
    with pytest.raises(ConfigurationError, match="256, but the dataset has only 10 samples"):
        session.start()
    assert port is None or port.closed == 1


def test_the_runs_schedule_is_the_optimizers_rate_where_nobody_gave_one() -> None:
    model = new_model()
    optimizer = new_optimizer(model, lr=4e-4)
    LambdaLR(optimizer, lambda step: 0.5)
    schedule = SwarmSession(model, optimizer, config=RunConfig(total_steps=5)).hosting_config().lr_schedule
    assert schedule == ConstantLR(base_lr=4e-4, warmup_init_lr=0.0, warmup_steps=0)


def test_another_optimizer_is_answered_with_the_line_to_write() -> None:
    model = new_model()
    with pytest.raises(ConfigurationError, match=r"got AdamW: write optimizer = distro_optim\.DisTrO\("):
        SwarmSession(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


def test_a_session_that_was_not_started_says_how() -> None:
    model = new_model()
    session = SwarmSession(model, new_optimizer(model))
    with pytest.raises(DistroError, match="with SwarmSession"):
        session.next_round()
    session.close()
    session.close()
    with pytest.raises(DistroError, match="make a new one"):
        session.start()


def test_a_malformed_ticket_is_refused_at_the_start() -> None:
    model = new_model()
    session = SwarmSession(model, new_optimizer(model), run="psyche1nonsense")
    with pytest.raises(ConfigurationError):
        session.start()
    session.close()


def test_a_host_needs_to_know_how_long_to_train() -> None:
    model = new_model()
    with pytest.raises(ConfigurationError, match="a run needs total_steps"):
        SwarmSession(model, new_optimizer(model)).start()


def test_a_checkpoint_folder_that_cannot_be_used_is_refused_before_the_run_is_joined(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    world = make_world(**ALONE)
    world.run(world.port(1), Script(session_settings={"checkpoint_dir": tmp_path / "file"}))
    with pytest.raises(ConfigurationError, match="name a folder that can be written"):
        world.until_all_ended()
    assert world.ports[0].member is None


def test_a_run_that_cannot_go_on_ends_in_an_error_and_closes_the_session(make_world: MakeWorld) -> None:
    script = Script()

    def refusing(port: SimulatedPort) -> None:
        port.initialized = lambda plan, names: port.initialization_failed("no room")  # type: ignore[method-assign]
        script(port)

    with pytest.raises(RunError, match="the model cannot be loaded: no room"):
        run_alone(make_world, refusing)
    assert script.port.closed


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_environment_gets_its_ticket_and_a_report_of_every_round(
    make_world: MakeWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REPORT, str(tmp_path / "report"))
    monkeypatch.setenv(TICKET_FILE, str(tmp_path / "ticket"))
    monkeypatch.setenv(PEER_NAME, "first")
    world = make_world(**{**ALONE, "init_min_clients": 2})
    scripts = [Script(seed=1), Script(seed=2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
        monkeypatch.setenv(PEER_NAME, "second")
        world.step()
        monkeypatch.setenv(PEER_NAME, "first")
    world.until_all_ended()
    assert (tmp_path / "ticket").read_text().strip() == "psyche1simulated"
    lines = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    rounds = [line for line in lines if line["kind"] == "round"]
    assert {line["step"] for line in rounds} == set(range(1, 8))
    for step in range(1, 8):
        assert len({line["weights_hash"] for line in rounds if line["step"] == step}) == 1
    ends = [line for line in lines if line["kind"] == "ended"]
    assert len(ends) == 2
    assert ends[0]["weights_hash"] == ends[1]["weights_hash"] != rounds[0]["weights_hash"]
    assert all(line["loss"] > 0 for line in rounds)
    assert equal_weights(*scripts)
