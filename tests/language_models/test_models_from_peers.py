"""A model that peers share is taken only if names, shapes, types and values are those of its configuration."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from distro_optim.comm.iroh.sharing.torchscript import read_tensor, write_tensor
from distro_optim.comm.model_exchange import SharedModel
from distro_optim.coordinator.model import (
    LLM,
    P2P,
    ConstantLR,
    Distro,
    DummyData,
    HubRepo,
    LLMArchitecture,
    LLMTrainingDataType,
)
from distro_optim.errors import ModelTooLargeError, ProtocolError
from distro_optim.models.causal_lm import CausalLM
from language_models.small import DEEPSEEK, EXPERTS, LLAMA, sentences


@pytest.mark.slow
def test_a_model_that_is_shared_is_the_same_on_the_other_side() -> None:
    for architecture, config in (("HfLlama", LLAMA), ("HfDeepseek", DEEPSEEK), ("HfAuto", EXPERTS)):
        model = CausalLM(config, architecture, seed=5)
        model.companions["tokenizer.json"] = b'{"version": "1.0"}'
        shared = model.shared_model()
        # Each as it travels, in no particular order, as Psyche's clients name them.
        travelled = {name: read_tensor(write_tensor(t)) for name, t in reversed(list(shared.parameters.items()))}
        received = CausalLM.from_shared(dataclasses.replace(shared, parameters=travelled), architecture, seed=6)
        assert all(torch.equal(t, received.tensors()[name]) for name, t in model.tensors().items())
        assert received.companions == {"tokenizer.json": b'{"version": "1.0"}'}
        assert received.shared_model().config == shared.config


def test_what_is_shared_does_not_change_while_training_goes_on() -> None:
    model = CausalLM(LLAMA, "HfLlama")
    shared = model.shared_model()
    before = {name: tensor.clone() for name, tensor in shared.parameters.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in shared.parameters.items())


@pytest.mark.slow
def test_weights_of_peers_are_taken_into_a_model_that_trains_already() -> None:
    ours, theirs = (CausalLM(LLAMA, "HfLlama", seed=seed) for seed in (1, 2))
    optimizer = ours.make_optimizer(lr=1e-3)
    parameters = list(ours.parameters())
    ours.load_shared(theirs.shared_model())
    assert all(torch.equal(t, ours.tensors()[name]) for name, t in theirs.tensors().items())
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in parameters}


def test_a_run_says_architecture_and_sequence_length() -> None:
    run = LLM(
        max_seq_len=16,
        cold_start_warmup_steps=0,
        architecture=LLMArchitecture.HF_DEEPSEEK,
        checkpoint=P2P(HubRepo("")),
        data_type=LLMTrainingDataType.PRETRAINING,
        data_location=DummyData(),
        lr_schedule=ConstantLR(1e-3, 0.0, 0),
        optimizer=Distro(None, None, 0.999, 8, 64, True),
    )
    text = json.dumps({key: value for key, value in DEEPSEEK.items() if key != "model_type"})
    shared = SharedModel(text, "", CausalLM(DEEPSEEK, "HfDeepseek").shared_model().parameters)
    model = CausalLM.from_run(run, shared)
    assert model.config.architecture is LLMArchitecture.HF_DEEPSEEK
    assert model.config.values["max_position_embeddings"] == 16
    assert model(sentences(1)).loss.isfinite()


Change = Callable[[dict[str, Any]], None]


def without(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def with_(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.__setitem__(name, tensor)


NORM = "model.norm.weight"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(NORM), "they lack model.norm.weight"),
        (with_("model.extra", torch.ones(3)), "they have model.extra too many"),
        (with_(NORM, torch.ones(63, dtype=torch.bfloat16)), r"has shape \(63,\)"),
        (with_(NORM, torch.ones(64, 1, dtype=torch.bfloat16)), r"has shape \(64, 1\)"),
        (with_(NORM, torch.ones(64, dtype=torch.int64)), "is stored as int64"),
        (with_(NORM, torch.ones(64, dtype=torch.complex64)), "is stored as complex64"),
        (with_(NORM, torch.full((64,), float("nan"), dtype=torch.bfloat16)), "not finite"),
        (with_(NORM, torch.full((64,), float("inf"), dtype=torch.bfloat16)), "not finite"),
        (dict.clear, "they lack lm_head.weight, model.embed_tokens.weight, .* and 18 more"),
    ],
)
def test_parameters_that_are_not_this_models_are_refused(change: Change, words: str) -> None:
    shared = CausalLM(LLAMA, "HfLlama").shared_model()
    tensors = dict(shared.parameters)
    change(tensors)
    with pytest.raises(ProtocolError, match=words):
        CausalLM.from_shared(dataclasses.replace(shared, parameters=tensors), "HfLlama")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ["", "{", "consilience-40b", "/etc/passwd", "config.json", '{"model_type": "bert"}', "[1]", '{"a":' * 9999, "{}"],
)
def test_a_config_that_is_none_is_refused_and_no_file_is_opened_for_it(config: str) -> None:
    shared = CausalLM(LLAMA, "HfLlama").shared_model()
    with pytest.raises(ProtocolError, match="the peers' model cannot be used"):
        CausalLM.from_shared(dataclasses.replace(shared, config=config), "HfLlama")


def test_a_config_of_a_model_beyond_all_memory_is_refused_before_it_is_made() -> None:
    shared = CausalLM(LLAMA, "HfLlama").shared_model()
    huge = json.dumps({**LLAMA, "vocab_size": 1 << 30, "hidden_size": 1 << 24})
    with pytest.raises((ModelTooLargeError, ProtocolError)):
        CausalLM.from_shared(dataclasses.replace(shared, config=huge), "HfLlama")


@pytest.mark.slow
def test_nothing_of_a_refused_model_is_taken() -> None:
    ours = CausalLM(LLAMA, "HfLlama")
    before = {name: tensor.clone() for name, tensor in ours.tensors().items()}
    shared = CausalLM(LLAMA, "HfLlama", seed=2).shared_model()
    wrong = {**shared.parameters, NORM: torch.ones(3)}
    with pytest.raises(ProtocolError):
        ours.load_shared(dataclasses.replace(shared, parameters=wrong))
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.tensors().items())


async def _through_the_protocol(model: SharedModel) -> SharedModel:
    """Every part as the blob that its ticket leads to."""
    from distro_optim.comm.iroh.sharing import transfer as sharing
    from distro_optim.comm.iroh.sharing.messages import ModelConfig, decode_blob, encode_blob

    config = decode_blob(encode_blob(ModelConfig(model.config, model.tokenizer, list(model.parameters))))
    assert isinstance(config, ModelConfig)
    parameters = {
        name: sharing.parameter_tensor(name, sharing.parameter_blob(name, model.parameters[name]))
        for name in config.parameter_names
    }
    return SharedModel(config.config, config.tokenizer, parameters)


@pytest.mark.slow
def test_a_model_survives_the_blobs_of_model_sharing() -> None:
    model = CausalLM(DEEPSEEK, "HfDeepseek", seed=8)
    received = CausalLM.from_shared(asyncio.run(_through_the_protocol(model.shared_model())), "HfDeepseek")
    assert all(torch.equal(t, received.tensors()[name]) for name, t in model.tensors().items())
