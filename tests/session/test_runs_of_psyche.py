"""In a run of Psyche's the coordinator's settings count, and what is shared is what its clients read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.coordinator.model import Distro, Hub, HubRepo
from distro_optim.coordinator.types import RunState
from distro_optim.errors import ConfigurationError, ModelMismatchError
from distro_optim.strategy.model.psyche_settings import adopt_settings, settings_of
from distro_optim.strategy.sample_order import sample_indices, shuffle_seed

from .scripts import SAMPLES, Net, Script, equal_weights
from .world import SessionWorld, SimulatedPort

MakeWorld = Callable[..., SessionWorld]
SETTINGS = Distro(
    clip_grad_norm=1.0,
    weight_decay=0.25,
    compression_decay=0.5,
    compression_topk=3,
    compression_chunk=4,
    quantize_1bit=True,
)
RUN_LR = 2.0**-8
SAME_START: dict[str, Any] = {"seed": 1}  # as if loaded from the hub


class Plain(Net):
    """Without statistics, of which Psyche's clients know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(10)


def psyche_world(make_world: MakeWorld, **settings: int) -> SessionWorld:
    return make_world(
        checkpoint=Hub(HubRepo("somebody/model")),
        optimizer=SETTINGS,
        lr=RUN_LR,
        **{"total_steps": 40, "epoch_time": 60, "init_min_clients": 2, "min_clients": 2, **settings},
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peers_adopt_the_runs_settings_and_stay_equal_with_a_late_joiner(
    make_world: MakeWorld, dtype: torch.dtype
) -> None:
    world = psyche_world(make_world)
    scripts = [Script(model_class=Plain, dtype=dtype, **SAME_START) for _ in range(2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    late = Script(model_class=Plain, dtype=dtype, seed=9)
    world.run(world.port(3), late)
    world.until_all_ended()
    assert late.trained
    world.assert_equal_hashes()
    assert equal_weights(*scripts, late)
    group = scripts[0].optimizer.param_groups[0]
    assert settings_of(scripts[0].optimizer) == replace(SETTINGS, clip_grad_norm=None)
    assert group["compression_topk"] == 3
    assert scripts[0].optimizer.tiling == "divisor"
    assert "the run's settings count: weight_decay is 0.25 (the script says 0.1)" in scripts[0].news
    assert 'the run\'s settings count: tiling is "divisor" (the script says "padded")' in scripts[0].news
    told = 'the run\'s settings count: arithmetic is "psyche", that of its clients (the script says "exact")'
    assert told in scripts[0].news
    told = "the run's settings count: learning rates are the run's, ConstantLR of 0.00390625 (the script says 0.01)"
    assert told in scripts[0].news
    assert "the run's settings count: gradients are clipped to a norm of 1" in scripts[0].news
    assert any("somebody/model; the model must have them already" in line for line in scripts[0].news)


@pytest.mark.slow
def test_what_is_shared_is_bfloat16_sorted_by_name_and_without_statistics(make_world: MakeWorld) -> None:
    shared: list[SharedModel] = []

    def keep(port: SimulatedPort) -> None:
        offer = port.offer_model

        def offer_and_keep(model: SharedModel) -> None:
            shared.append(model)
            offer(model)

        port.offer_model = offer_and_keep  # type: ignore[method-assign]

    world = psyche_world(make_world, total_steps=8)
    scripts = [Script(**SAME_START) for _ in range(2)]
    for number, script in enumerate(scripts, start=1):
        port = world.port(number)
        keep(port)
        world.run(port, script)
    world.until_all_ended()
    model = shared[-1]
    assert list(model.parameters) == sorted(model.parameters, key=str.encode)
    assert {tensor.dtype for tensor in model.parameters.values()} == {torch.bfloat16}
    assert "norm.running_mean" not in model.parameters
    assert "frozen" in model.parameters
    assert json.loads(model.config)["distro_optim"]["step"] == 8
    # The weights were rounded to what is shared, so that all go on from the same ones.
    for name, tensor in model.parameters.items():
        assert torch.equal(scripts[0].model.get_parameter(name).detach(), tensor.float())


@pytest.mark.slow
def test_a_model_from_a_client_of_psyche_is_taken_without_our_description(make_world: MakeWorld) -> None:
    world = psyche_world(make_world)
    scripts = [Script(model_class=Plain, **SAME_START) for _ in range(2)]
    for number, script in enumerate(scripts, start=1):
        port = world.port(number)
        offer = port.offer_model
        port.offer_model = lambda model, offer=offer: offer(replace(model, config="{}"))  # type: ignore[misc, method-assign]
        world.run(port, script)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    late = Script(model_class=Plain, seed=9)
    world.run(world.port(3), late)
    world.until_all_ended()
    assert late.trained
    assert equal_weights(*scripts, late)


@pytest.mark.slow
def test_the_script_may_insist_on_its_own_rates_and_on_nothing_else(make_world: MakeWorld) -> None:
    world = psyche_world(make_world, total_steps=8)
    scripts = [Script(model_class=Plain, session_settings={"learning_rates": "script"}) for _ in range(2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_all_ended()
    assert settings_of(scripts[0].optimizer) == replace(SETTINGS, clip_grad_norm=None)
    assert scripts[0].optimizer.tiling == "divisor"
    assert not [line for line in scripts[0].news if "learning rates" in line]
    assert equal_weights(*scripts)


def test_settings_that_fit_already_are_not_told() -> None:
    optimizer = DisTrO(
        nn.Linear(4, 4).parameters(), tiling="divisor", compression_topk=3, compression_chunk=4, arithmetic="psyche"
    )
    assert adopt_settings(optimizer, settings_of(optimizer)) == []


def test_the_recipe_of_a_script_becomes_psyches_rules() -> None:
    optimizer = DisTrO(nn.Linear(4, 4).parameters(), direction="orthogonal", update="rms")
    changes = adopt_settings(optimizer, SETTINGS)
    assert "direction is momentum (the script says orthogonal)" in changes
    assert "update is sign (the script says rms)" in changes
    [group] = optimizer.param_groups
    assert (group["direction"], group["update"], group["gain"]) == ("momentum", "sign", 1.0)
    assert "momentum_buffer" not in optimizer.state[group["params"][0]]


def test_another_transform_than_psyches_is_refused() -> None:
    optimizer = DisTrO(nn.Linear(4, 4).parameters(), transform="identity")
    with pytest.raises(ConfigurationError, match="leave transform out"):
        adopt_settings(optimizer, SETTINGS)


@pytest.mark.slow
def test_after_a_pause_those_who_stayed_go_on_with_their_weights_and_who_comes_takes_them(
    make_world: MakeWorld,
) -> None:
    """As Psyche's clients do at such a coordinator, although it names the hub again: they load a model only once."""
    world = psyche_world(make_world)
    scripts = [Script(model_class=Plain, **SAME_START) for _ in range(2)]
    for number, script in enumerate(scripts, start=1):
        world.run(world.port(number), script)
    world.until_phase(RunState.ROUND_TRAIN, height=4)
    world.host.pause(world.unix_time)
    paused = world.until_phase(RunState.PAUSED)
    kept = [script.trainer.digests() for script in scripts]
    assert kept[0] == kept[1]
    late = Script(model_class=Plain, seed=9)  # with what the hub has, which nobody has replaced meanwhile
    world.run(world.port(3), late)
    world.host.resume(world.unix_time)
    again = world.until_phase(RunState.WARMUP, epoch=1)
    assert isinstance(again.model.checkpoint, Hub)
    assert again.epoch_state.cold_start_epoch
    begun = world.until_phase(RunState.ROUND_TRAIN, epoch=1)
    assert begun.progress.step == paused.progress.step
    assert [list(port.hashes[begun.progress.step]) for port in world.ports] == [kept[0]] * 3
    world.until_all_ended()
    assert late.trained
    assert equal_weights(*scripts, late)


@pytest.mark.parametrize(
    "joiner", [Script(model_class=Plain, by_data_index=True, seed=9), None], ids=["script", "join"]
)
def test_scripts_with_tokens_train_the_runs_own_samples_beside_peers_that_know_no_length(
    make_world: MakeWorld, joiner: Script | None
) -> None:
    """As ``distro-optim join`` does, and Psyche's clients."""
    script = Script(model_class=Plain, by_data_index=True, **SAME_START)
    join = Script(model_class=Plain, session_settings={"dataset_size": None}, **SAME_START)
    late = joiner or Script(model_class=Plain, session_settings={"dataset_size": None}, seed=9)
    world = psyche_world(make_world, total_steps=7, epoch_time=10, global_batch_size_start=8, global_batch_size_end=8)
    for number, each in enumerate((script, join), start=1):
        world.run(world.port(number), each)
    world.until_phase(RunState.ROUND_TRAIN, height=1)
    world.run(world.port(3), late)
    world.until_all_ended()
    assert late.trained
    assert equal_weights(script, join, late)
    seen = sorted(script.samples_seen + join.samples_seen + late.samples_seen)
    assert seen[:24] == list(range(24))
    assert set(Counter(index // 8 for index in seen).values()) == {8}  # each batch of the coordinator is whole
    assert not any("in this script's own order" in line for line in script.news)


def test_an_order_of_ones_own_is_told_and_refused_beside_peers_that_have_none(make_world: MakeWorld) -> None:
    world = psyche_world(make_world, total_steps=20, init_min_clients=1, min_clients=1)
    join = Script(model_class=Plain, session_settings={"dataset_size": None}, **SAME_START)
    world.run(world.port(1), join)
    world.until_phase(RunState.ROUND_TRAIN, height=2)
    shuffled = Script(model_class=Plain, seed=9)
    world.run(world.port(2), shuffled)
    with pytest.raises(ModelMismatchError) as caught:
        world.until_all_ended()
    assert caught.value.what == "length of the dataset"
    assert str(caught.value) == (
        "the run trains something else: length of the dataset is 60 here and not set in the run; use the same dataset "
        "as the others; beside distro-optim join and Psyche's clients give the strategy a TokenDataModule of the run's "
        "data or another dataset with by_data_index = True, and a session no dataset_size, with round.batch in place "
        "of round.indices"
    )
    assert any(line.startswith("samples are taken in this script's own order") for line in shuffled.news)


def test_in_a_run_of_our_own_tokens_are_shuffled_as_ever(make_world: MakeWorld) -> None:
    world = make_world(total_steps=4, init_min_clients=1, min_clients=1)
    script = Script(by_data_index=True)
    world.run(world.port(1), script)
    world.until_all_ended()
    count = len(script.samples_seen)
    assert script.samples_seen == sample_indices(range(count), SAMPLES, shuffle_seed("run"))
