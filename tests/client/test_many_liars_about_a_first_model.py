"""A client without a model of its own gets the honest one, however many peers lie about it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from client.ports import ScriptedPort
from client.processes import DISTRO, TINY_LLAMA, write_state
from distro_optim.client.first_model import FirstModel
from distro_optim.client.preparing import prepare
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.model import P2P, HubRepo
from distro_optim.coordinator.server.store import read_state_file
from distro_optim.coordinator.types import Coordinator
from distro_optim.errors import ModelConfigError
from distro_optim.models.causal_lm import CausalLM
from distro_optim.strategy.rounds.actions import Initialize
from session.crowd import Crowd, peers

pytestmark = pytest.mark.waiting

SMALL = {**TINY_LLAMA, "vocab_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 32}
CPU = torch.device("cpu")
HOW_MANY = [1, 3]
(HONEST,) = peers(1, first=200)


@pytest.fixture(scope="module")
def theirs() -> SharedModel:
    return CausalLM(SMALL, "HfLlama", seed=3).shared_model()


@pytest.fixture
def state(tmp_path: Path) -> Coordinator:
    text = '{ P2P = { repo_id = "no-such/model-anywhere" } }'
    return read_state_file(write_state(tmp_path / "state.toml", checkpoint=text, optimizer=DISTRO))


class CrowdPort(ScriptedPort):
    """A run that asks for its model again and again, and a crowd that shares some."""

    def __init__(self, models: Mapping[bytes, SharedModel]) -> None:
        repo = HubRepo("no-such/model-anywhere")
        action = Initialize(epoch=1, step=9, checkpoint=P2P(repo), providers=tuple(models))
        super().__init__([action] * (3 * len(models)))
        self.crowd = Crowd(models)

    @override
    def download_model(self, providers: Iterable[bytes], **settings: Any) -> SharedModel:
        return self.crowd.download_model(providers, **settings)


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_models_that_cannot_be_built_keep_nobody_out(how_many: int, state: Coordinator, theirs: SharedModel) -> None:
    other = replace(theirs, config=json.dumps({**SMALL, "model_type": "gpt2"}))
    port = CrowdPort({**dict.fromkeys(peers(how_many), other), HONEST: theirs})
    port.crowd.late[HONEST] = 15
    assert FirstModel(port, state.model, CPU).download().config == theirs.config


@pytest.mark.parametrize("how_many", HOW_MANY)
def test_parts_that_are_none_of_the_model_keep_nobody_out(
    how_many: int, state: Coordinator, theirs: SharedModel
) -> None:
    """Liars describe the honest model, and send tensors of another shape for it."""
    wrong = replace(theirs, parameters={name: torch.zeros(1) for name in theirs.parameters})
    port = CrowdPort({**dict.fromkeys(peers(how_many), wrong), HONEST: theirs})
    made = prepare(
        port,
        state,
        key=SecretKey(bytes(range(32))),
        device=CPU,
        folder=None,
        progress=lambda done, total: None,
        tell=lambda text: None,
    )
    assert all(tensor.equal(theirs.parameters[name]) for name, tensor in made.model.tensors().items())


def test_what_all_of_them_say_is_believed(state: Coordinator, theirs: SharedModel) -> None:
    other = replace(theirs, config=json.dumps({**SMALL, "model_type": "gpt2"}))
    with pytest.raises(ModelConfigError, match="gpt2"):
        FirstModel(CrowdPort(dict.fromkeys(peers(3), other)), state.model, CPU).download()
