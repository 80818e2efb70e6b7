"""Type, order and shape of what is trained are the run's to say: a library that prefers others is overruled or refused.

The stand-in for such a library is transformers itself, whose models are changed the moment they are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim.compress.wire import TransmittableDistroResult, encode_download
from distro_optim.coordinator.model import Distro
from distro_optim.errors import ModelConfigError, ModelWeightsError, ProtocolError
from distro_optim.models.accumulation import train_batch
from distro_optim.models.building import build_empty, build_fresh, build_shapes, sorted_parameters
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.native_shapes import check_native_shapes, native_shapes
from language_models.small import DEEPSEEK, EXPERTS, LLAMA, sentences

KINDS = [
    pytest.param("HfLlama", LLAMA, id="Llama"),
    pytest.param("HfDeepseek", DEEPSEEK, id="DeepSeek"),
    pytest.param("HfAuto", EXPERTS, id="DeepSeek with experts"),
]
NORM = "model.norm.weight"

Library = Callable[[Callable[[nn.Module], object]], None]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Call it with what another version of the library does to each model that it makes."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_config

    def change(altered: Callable[[nn.Module], object]) -> None:
        def from_config(*args: Any, **settings: Any) -> nn.Module:
            model: nn.Module = plain(*args, **settings)
            altered(model)
            return model

        monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)

    return change


def wide_gates(model: nn.Module) -> None:
    """As transformers 5.24 does: here in every model, on both ways by which a module gets a parameter."""
    norm = model.get_submodule("model.norm")
    norm.weight = nn.Parameter(norm.get_parameter("weight").detach().float())  # through the registration
    head = model.get_submodule("lm_head")
    head._parameters["weight"] = nn.Parameter(head.get_parameter("weight").detach().float())  # and past it
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name == "e_score_correction_bias":
                module._buffers[name] = buffer.float()


def rename(model: nn.Module) -> None:
    model.get_submodule("model").add_module("final_norm", model.get_submodule("model.norm"))
    del model.get_submodule("model")._modules["norm"]


def transpose(model: nn.Module) -> None:
    head = model.get_submodule("lm_head")
    head.weight = nn.Parameter(head.get_parameter("weight").detach().T.contiguous())


def add_one(model: nn.Module) -> None:
    model.get_submodule("model.norm").register_parameter("bias", nn.Parameter(torch.zeros(64)))


def types(model: CausalLM) -> set[torch.dtype]:
    return {tensor.dtype for tensor in model.tensors().values()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(("architecture", "config"), KINDS)
def test_every_way_to_a_model_gives_the_type_of_the_run(
    tmp_path: Path, library: Library, architecture: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    plain = CausalLM(config, architecture, seed=3, dtype=dtype)
    plain.save_pretrained(tmp_path)
    library(wide_gates)
    read = read_config(config, architecture)
    for build in (build_shapes(read, dtype), build_empty(read, dtype=dtype), build_fresh(read, 0, dtype=dtype)):
        assert {p.dtype for p in sorted_parameters(build).values()} == {dtype}
    fresh = CausalLM(config, architecture, seed=3, dtype=dtype)
    loaded = CausalLM.from_folder(tmp_path, architecture, dtype=dtype)
    received = CausalLM.from_shared(plain.shared_model(), architecture, dtype=dtype)
    for model in (fresh, loaded, received):
        assert types(model) == {dtype}
        assert list(model.tensors()) == list(plain.tensors())
        assert all(torch.equal(t, model.tensors()[name]) for name, t in plain.tensors().items())


def test_what_peers_send_in_another_type_becomes_that_of_the_run() -> None:
    model = CausalLM(EXPERTS, "HfAuto", seed=1)
    shared = CausalLM(EXPERTS, "HfAuto", seed=2).shared_model()
    wide = dataclasses.replace(shared, parameters={name: t.float() for name, t in shared.parameters.items()})
    model.load_shared(wide)
    assert types(model) == types(CausalLM.from_shared(wide, "HfAuto")) == {torch.bfloat16}
    assert all(torch.equal(t, model.tensors()[name]) for name, t in shared.parameters.items())
    assert {t.dtype for t in model.shared_model().parameters.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "config"), KINDS)
def test_peers_with_two_versions_of_the_library_send_the_same_bytes(
    library: Library, architecture: str, config: dict[str, Any]
) -> None:
    def first_result() -> bytes:
        model = CausalLM(config, architecture, seed=3)
        optimizer = model.make_optimizer(lr=1e-3, definition=Distro(None, None, 0.999, 8, 64, False))
        train_batch(model, sentences(4))
        update = optimizer.generate()
        return encode_download(TransmittableDistroResult.from_update(update, step=1, trainer_nonce=0, batch_id=(0, 3)))

    one = first_result()
    library(wide_gates)
    assert first_result() == one


def test_first_weights_are_drawn_in_the_type_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router in float32 would draw other random numbers than one in bfloat16, and so would what comes after it."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router

    plain: Any = Router.__init__
    made = []
    for dtype in (torch.float32, torch.bfloat16):

        def init(self: Any, *args: Any, dtype: torch.dtype = dtype, **settings: Any) -> None:
            plain(self, *args, **settings)
            self.weight = nn.Parameter(torch.zeros_like(self.weight, dtype=dtype))

        monkeypatch.setattr(Router, "__init__", init)
        made.append(CausalLM(EXPERTS, "HfAuto", seed=3).tensors())
    one, other = made
    assert bool(one["model.layers.1.mlp.gate.weight"].any())
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}


def test_parameters_in_another_order_are_refused() -> None:
    config = read_config(LLAMA, "HfLlama")
    shapes = native_shapes(config)
    check_native_shapes(config, shapes)
    with pytest.raises(ModelConfigError, match=r"has model\.norm\.weight where lm_head\.weight belongs"):
        check_native_shapes(config, dict(reversed(shapes.items())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, r"makes model\.norm\.weight not at all, .* have it of shape \(64,\)"),
        (transpose, r"makes lm_head\.weight of shape \(64, 96\), .* have it of shape \(96, 64\)"),
        (add_one, r"makes model\.norm\.bias, .* do not have it"),
    ],
)
@pytest.mark.parametrize(("architecture", "config"), KINDS[:2])
def test_a_library_that_makes_another_model_than_psyches_peers_is_refused(
    library: Library, architecture: str, config: dict[str, Any], change: Callable[[nn.Module], None], words: str
) -> None:
    shared = CausalLM(config, architecture).shared_model()
    library(change)
    pattern = r"transformers \d+\.\d+\.\d+ " + words + ": install another version of transformers"
    for build in (build_shapes, build_empty, lambda read: build_fresh(read, 0)):
        with pytest.raises(ModelConfigError, match=pattern):
            build(read_config(config, architecture))
    with pytest.raises(ProtocolError, match=pattern):
        CausalLM.from_shared(shared, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("change", [rename, transpose, add_one])
def test_any_model_that_the_library_makes_otherwise_than_the_peers_is_refused_with_its_version(
    tmp_path: Path, library: Library, change: Callable[[nn.Module], None]
) -> None:
    model = CausalLM(EXPERTS, "HfAuto")
    shared = model.shared_model()
    model.save_pretrained(tmp_path)
    library(change)
    pattern = r"not this model's: .*(norm|lm_head).*\(here transformers \d+\.\d+\.\d+ makes the model: all peers need"
    with pytest.raises(ProtocolError, match=pattern):
        CausalLM.from_shared(shared, "HfAuto")
    with pytest.raises(ModelWeightsError, match=pattern):
        CausalLM.from_folder(tmp_path, "HfAuto")


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        *KINDS[:2],
        ("HfDeepseek", {**DEEPSEEK, "q_lora_rank": None, "v_head_dim": 24, "num_hidden_layers": 11}),
        ("HfDeepseek", {**DEEPSEEK, "attention_bias": True}),
        ("HfLlama", {**LLAMA, "num_key_value_heads": 4, "num_hidden_layers": 11}),
    ],
)
def test_names_order_and_shapes_are_known_without_the_library(architecture: str, config: dict[str, Any]) -> None:
    read = read_config(config, architecture)
    made = {name: tuple(p.shape) for name, p in sorted_parameters(build_shapes(read)).items()}
    assert list(native_shapes(read).items()) == list(made.items())


def test_embeddings_that_are_tied_are_still_known_to_be_tied_in_another_type(tmp_path: Path, library: Library) -> None:
    from distro_optim.models.building import tied_sources

    tied = {**LLAMA, "tie_word_embeddings": True}
    library(wide_gates)
    read = read_config(tied, "HfAuto")
    assert tied_sources(build_empty(read), read) == {"lm_head.weight": "model.embed_tokens.weight"}
