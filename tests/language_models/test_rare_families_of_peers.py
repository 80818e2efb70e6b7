"""A peer may train any family that transformers has; one that multiplies numbers is tried in a process with limits."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

import pytest
import transformers

import warm_python
from distro_optim.errors import ModelConfigError
from distro_optim.models import config as config_module
from distro_optim.models import trial
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.strangers import FAMILIES, check_strangers_config, is_ordinary
from distro_optim.models.trial import TrialLimits, try_to_build
from language_models.small import LLAMA, sentences

MAMBA: dict[str, Any] = {
    "model_type": "mamba",
    "vocab_size": 96,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "state_size": 4,
    "tie_word_embeddings": False,
}
XMOD: dict[str, Any] = {
    "model_type": "xmod",
    "vocab_size": 96,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "is_decoder": True,
}
#: What transformers writes beside, whatever the model.
OF_EVERY_MODEL: dict[str, Any] = {
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "pruned_heads": {},
    "prefix": None,
    "problem_type": None,
    "finetuning_task": None,
}


@pytest.fixture
def fast_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same process, as a fork that has loaded the libraries."""
    trial._tried.cache_clear()
    monkeypatch.setattr(trial, "Popen", warm_python.Popen)
    yield
    trial._tried.cache_clear()


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(trial, "Popen", start)


@pytest.mark.waiting
def test_a_rare_family_is_built_and_trains(fast_process: None) -> None:
    theirs = CausalLM(MAMBA, seed=3)
    shared = theirs.shared_model()
    ours = CausalLM.from_shared(shared)
    assert "mamba" not in FAMILIES
    for name, tensor in ours.tensors().items():
        assert tensor.equal(shared.parameters[name])
    ours(sentences(2)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.waiting
@pytest.mark.parametrize(
    ("values", "limits", "words"),
    [
        # A module for each language in each layer.
        ({**XMOD, "num_hidden_layers": 512, "languages": [f"l{n}" for n in range(4000)]}, {"cpu_seconds": 0}, "a core"),
        # The product of numbers each of which is in bounds.
        ({**MAMBA, "hidden_size": 4096, "expand": 4096, "state_size": 4096}, {"memory_bytes": 1 << 30}, "memory"),
        ({**MAMBA, "vocab_size": 1 << 22, "hidden_size": 1 << 19, "expand": 4096}, {}, "too many parameters"),
        ({**MAMBA, "hidden_size": -1}, {}, "cannot be made"),
    ],
    ids=["time", "memory", "parameters", "nonsense"],
)
def test_what_is_too_much_is_refused_by_its_process(
    fast_process: None, values: dict[str, Any], limits: dict[str, Any], words: str
) -> None:
    check_strangers_config(values)
    with pytest.raises(ModelConfigError, match=words) as caught:
        try_to_build(json.dumps(values), "HfAuto", TrialLimits(**limits))
    assert "join with --model" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 100_000},
        {"vocab_size": 1 << 40},
        {"text_config": {"num_hidden_layers": 100_000}},
        {"blocks": [{"num_layers": 100_000}]},
        {"a": [[[[[[[[[[1]]]]]]]]]]},
        {"layer_types": ["mamba"] * 5000},
        {"H_cycles": 1 << 20},
        {"time_step_limit": [0.0, 10**400]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_numbers_and_lists_of_a_rare_family_are_bounded_before_a_process_is_started(
    no_process: None, change: dict[str, Any]
) -> None:
    with pytest.raises(ModelConfigError, match="beyond any model"):
        read_config(json.dumps({**MAMBA, **change}), from_peer=True)


def test_an_ordinary_family_needs_no_process_whatever_transformers_writes_beside(no_process: None) -> None:
    made = read_config({**LLAMA, **OF_EVERY_MODEL}, from_peer=True)
    assert made.vocab_size == LLAMA["vocab_size"]
    assert made.to_transformers().vocab_size == LLAMA["vocab_size"]


@pytest.mark.parametrize("name", ["text_config", "vision_config", "decoder", "pruned_heads"])
def test_a_model_within_an_ordinary_one_is_tried(name: str) -> None:
    assert is_ordinary(LLAMA)
    assert not is_ordinary({**LLAMA, name: {"0": [1]}})


def test_a_model_that_takes_too_long_is_ended(fast_process: None) -> None:
    with pytest.raises(ModelConfigError, match=r"could not be built in 0 seconds: .*--model"):
        try_to_build(json.dumps(MAMBA), "HfAuto", TrialLimits(wall_seconds=0))


def test_a_process_that_crashes_or_says_nothing_is_a_refusal() -> None:
    limits = TrialLimits(cpu_seconds=7)
    assert trial._problem(-11, b"", limits) == "ends the process that builds it (signal 11)"
    assert trial._problem(-9, b"", limits) == "takes more than 7 seconds of a core to build"
    for answer in (b"", b"[]", b"{}", b"\xff"):
        assert trial._problem(1, answer, limits) == "could not be built (a process ended with 1)"
    assert trial._problem(0, b'{"problem": "\\u001b[31m"}', limits) == "?[31m"
    assert trial._problem(0, b'{"problem": null}', limits) is None


def test_where_a_process_cannot_be_limited_only_ordinary_families_are_built(
    no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial._tried.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelConfigError, match=r"a process with limits, which this system does not have: .*--model"):
        read_config(MAMBA, from_peer=True)
    read_config(LLAMA, from_peer=True)


def test_a_file_of_ones_own_is_not_tried(no_process: None) -> None:
    assert read_config(MAMBA).vocab_size == 96


def test_what_names_code_is_left_out_of_models_within_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(config_module, "try_to_build", lambda text, architecture: tried.append(text))
    unsafe = {"attn_implementation": "someone/kernel", "_attn_implementation": "someone/kernel", "auto_map": {"a": "b"}}
    values = {"model_type": "gemma3", "text_config": {"vocab_size": 32, **unsafe}, "list": [{**unsafe, "kept": 1}]}
    made = read_config(values, from_peer=True)
    assert made.values["text_config"] == {"vocab_size": 32}
    assert made.values["list"] == [{"kept": 1}]
    assert "someone" not in tried[0]


def test_the_vocabulary_is_found_where_the_file_leaves_it_to_the_family() -> None:
    assert read_config({"model_type": "mamba"}).vocab_size == transformers.MambaConfig().vocab_size
    assert read_config({"model_type": "openai-gpt"}).vocab_size == transformers.OpenAIGPTConfig().vocab_size


def test_infinities_as_transformers_5_writes_them_are_infinite() -> None:
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    made = read_config({**MAMBA, **limit, "model_type": "mamba2", "num_heads": 4, "head_dim": 8})
    assert made.to_transformers().time_step_limit[1] == float("inf")
    assert "Infinity" in made.to_json()
