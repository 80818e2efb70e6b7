"""Who joins without the run's model on any disk gets it from peers, and believes them no more than it must."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import warm_python
from client.ports import ScriptedPort
from client.processes import DISTRO, TINY_LLAMA, write_state
from distro_optim import DisTrO
from distro_optim.client import first_model, preparing
from distro_optim.client.first_model import FirstModel, comes_through_peers
from distro_optim.client.preparing import Prepared, prepare
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import P2P, HubRepo, LLMArchitecture
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import Client, Coordinator, NodeIdentity, RunState
from distro_optim.errors import ExchangeError, ModelConfigError, ModelTooLargeError, ModelWeightsError, RunError
from distro_optim.models import trial
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.model.handover import ModelHandover
from distro_optim.strategy.model.named_tensors import NamedTensors
from distro_optim.strategy.model.trainer import SwarmTrainer
from distro_optim.strategy.rounds.actions import Initialize, RunEnded

pytestmark = pytest.mark.waiting


KEY = SecretKey(bytes(range(32)))
SMALL = {**TINY_LLAMA, "vocab_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 32}
PEER = bytes([7]) * 32
CPU = torch.device("cpu")


@pytest.fixture
def state(tmp_path: Path) -> Coordinator:
    return read_state_file(
        write_state(
            tmp_path / "state.toml", checkpoint='{ P2P = { repo_id = "no-such/model-anywhere" } }', optimizer=DISTRO
        )
    )


@pytest.fixture
def theirs() -> SharedModel:
    """As a client of Psyche shares it."""
    model = CausalLM(SMALL, "HfLlama", seed=3).shared_model()
    return replace(model, tokenizer='{"version": "1.0"}')


def initialize(*providers: bytes) -> Initialize:
    return Initialize(epoch=1, step=9, checkpoint=P2P(HubRepo("no-such/model-anywhere")), providers=providers)


def prepared(port: ScriptedPort, state: Coordinator) -> Prepared:
    return prepare(port, state, key=KEY, device=CPU, folder=None, progress=lambda done, total: None, tell=print)


def wants(state: Coordinator, models: Iterable[SharedModel | Exception], peers: int = 1) -> FirstModel:
    port = ScriptedPort([initialize(*(bytes([n]) * 32 for n in range(peers)))], models)
    return FirstModel(port, state.model, CPU)


def test_a_model_of_psyches_peers_is_trained(state: Coordinator, theirs: SharedModel) -> None:
    made = prepared(ScriptedPort([initialize(PEER)], [theirs]), state)
    assert made.model.config.vocab_size == 64
    assert isinstance(made.optimizer, DisTrO)
    for name, tensor in made.model.tensors().items():
        assert tensor.equal(theirs.parameters[name])
    assert made.model.companions == {"tokenizer.json": b'{"version": "1.0"}'}


def test_a_rare_family_of_psyches_peers_is_trained(state: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "Popen", warm_python.Popen)
    mamba = {"model_type": "mamba", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    theirs = CausalLM({**mamba, "id2label": {"0": "LABEL_0"}}, seed=3).shared_model()
    state = replace(state, model=replace(state.model, architecture=LLMArchitecture.HF_AUTO))
    made = prepared(ScriptedPort([initialize(PEER)], [theirs]), state)
    assert made.model.config.model_type == "mamba"
    assert all(tensor.equal(theirs.parameters[name]) for name, tensor in made.model.tensors().items())


def test_what_can_take_long_is_told(state: Coordinator, theirs: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextmanager
    def narrated(what: str, tell: Callable[[str], None]) -> Iterator[None]:
        said.append(what)
        yield

    monkeypatch.setattr(preparing, "narrated", narrated)
    prepared(ScriptedPort([initialize(PEER)], [theirs]), state)
    assert said == ["making the model"], "what comes from peers says itself how far it is"


def test_what_was_looked_at_comes_again_for_the_session(state: Coordinator, theirs: SharedModel) -> None:
    port = ScriptedPort([initialize(PEER), RunEnded(step=9)], [theirs])
    made = prepared(port, state)
    assert made.access.actions.next_action() == initialize(PEER)
    checked: list[str] = []
    model = made.access.sharing.download_model(
        [PEER], max_parameter_bytes=1, check=lambda peer, config, names: checked.append(config)
    )
    assert model is theirs
    assert checked == [theirs.config]
    assert made.access.actions.next_action() == RunEnded(step=9)
    with pytest.raises(ExchangeError):  # the second time it is the network's turn
        made.access.sharing.download_model([PEER], max_parameter_bytes=1)


def test_what_we_share_is_enough_to_make_the_model(state: Coordinator) -> None:
    model = CausalLM(SMALL, "HfLlama", seed=3)
    model.companions["tokenizer.json"] = b"{}"
    optimizer = model.make_optimizer(1e-3, state.model.optimizer)
    port = ScriptedPort([])
    trainer = SwarmTrainer(NamedTensors.of(model, optimizer), optimizer, sorted_by_name=True)
    handover = ModelHandover(port, trainer, model, script_rates=False, data={}, as_psyche=True, tell=print)
    handover.offer(handover.identity(1, 9), trainer.tensors.copies())
    ((_, shared),) = port.said
    assert shared.tokenizer == "{}"
    made = prepared(ScriptedPort([initialize(PEER)], [shared]), state)
    assert all(tensor.equal(model.tensors()[name]) for name, tensor in made.model.tensors().items())


def test_no_parameter_may_be_larger_than_the_configuration_says(state: Coordinator, theirs: SharedModel) -> None:
    port = ScriptedPort([initialize(PEER)], [theirs])
    prepared(port, state)
    largest = max(tensor.numel() * 4 for tensor in theirs.parameters.values())
    assert port.bounds == [largest + 64 * 1024]


def test_a_model_that_does_not_fit_is_not_downloaded(
    state: Coordinator, theirs: SharedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any, **settings: Any) -> None:
        raise ModelTooLargeError("the model does not fit", needed=2, available=1)

    monkeypatch.setattr(first_model, "check_memory", too_large)
    with pytest.raises(ModelTooLargeError):
        wants(state, [theirs]).download()


def test_a_configuration_that_is_not_the_runs_kind_is_refused(state: Coordinator, theirs: SharedModel) -> None:
    other = replace(theirs, config=json.dumps({**SMALL, "model_type": "gpt2"}))
    with pytest.raises(ModelConfigError, match="gpt2"):
        wants(state, [other]).download()


LIES: dict[str, dict[str, Any]] = {
    "a million layers": {"config": json.dumps({**SMALL, "num_hidden_layers": 10**6})},
    "layers without end": {"config": json.dumps({**SMALL, "num_hidden_layers": 10**30})},
    "a name": {"config": "llama-20m"},
    "no configuration": {"config": "{}"},
    "nothing": {"config": ""},
    "one parameter": {"parameters": {"lm_head.weight": torch.zeros(1)}},
    "code": {"config": json.dumps({**SMALL, "architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}})},
}


@pytest.mark.parametrize("lie", LIES)
def test_one_liar_among_many_peers_does_not_keep_us_out(state: Coordinator, theirs: SharedModel, lie: str) -> None:
    port = ScriptedPort([initialize(PEER, bytes(32))], [replace(theirs, **LIES[lie]), theirs])
    model = FirstModel(port, state.model, CPU).download()
    if lie == "code":  # which is left out, and the rest is true
        assert model.parameters is theirs.parameters
        assert prepared(ScriptedPort([initialize(PEER)], [model]), state).model.config.model_type == "llama"
    else:
        assert model is theirs
        assert port.said[0][0] == "refused"


def test_sizes_that_the_parameters_do_not_have_are_refused_and_another_peer_is_asked(
    state: Coordinator, theirs: SharedModel
) -> None:
    wrong = replace(theirs, config=json.dumps({**SMALL, "hidden_size": 64}))
    port = ScriptedPort([initialize(PEER, bytes(32)), initialize(PEER, bytes(32))], [wrong, theirs])
    made = prepared(port, state)
    assert made.model.config.values["hidden_size"] == SMALL["hidden_size"]
    joined, answer = port.said
    assert joined == ("start",)
    assert answer[0] == "initialization_failed"


def test_what_all_peers_say_is_believed_in_the_end(state: Coordinator, theirs: SharedModel) -> None:
    other = replace(theirs, config=json.dumps({**SMALL, "model_type": "gpt2"}))
    with pytest.raises(ModelConfigError):
        wants(state, [other] * 3, peers=3).download()


def test_peers_that_give_nothing_are_asked_again_when_the_run_says_so(state: Coordinator, theirs: SharedModel) -> None:
    port = ScriptedPort([initialize(PEER), initialize(PEER)], [ExchangeError("not now"), theirs])
    assert FirstModel(port, state.model, CPU).download() is theirs
    assert port.said == [("initialization_failed", "not now")]


def test_a_model_that_is_nowhere_is_told(state: Coordinator) -> None:
    with pytest.raises(ModelWeightsError, match="neither here nor with a peer"):
        prepared(ScriptedPort([initialize()]), state)


def test_a_run_that_ends_meanwhile_is_told(state: Coordinator) -> None:
    with pytest.raises(RunError, match="before its model could be loaded"):
        prepared(ScriptedPort([RunEnded(step=9)]), state)


@pytest.mark.parametrize(
    ("phase", "is_member", "expected"),
    [
        (RunState.WAITING_FOR_MEMBERS, False, False),
        (RunState.WARMUP, False, True),
        (RunState.WARMUP, True, False),
        (RunState.ROUND_TRAIN, False, True),
        (RunState.COOLDOWN, False, True),
        (RunState.PAUSED, False, False),
    ],
)
def test_who_comes_in_the_midst_of_the_first_epoch_waits_for_peers(
    tmp_path: Path, phase: RunState, is_member: bool, expected: bool
) -> None:
    state = read_state_file(
        write_state(tmp_path / "s.toml", checkpoint='{ Hub = { repo_id = "somebody/model" } }', optimizer=DISTRO)
    )
    clients = (Client(NodeIdentity.from_single_key(KEY.public)),) if is_member else ()
    state = replace(state, run_state=phase, epoch_state=replace(state.epoch_state, clients=clients))
    assert comes_through_peers(state, NodeIdentity.from_single_key(KEY.public)) is expected
