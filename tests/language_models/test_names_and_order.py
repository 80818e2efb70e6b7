"""A peer of Psyche has the parameters by the same names, in the same order and of the same shapes."""

from __future__ import annotations

import pytest
import torch

from distro_optim.models.building import build_shapes, sorted_parameters
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import read_config
from distro_optim.models.dummy import DUMMY_PARAMETERS, DummyModel
from distro_optim.optim.arguments import TORCH_KEEPS_NAMES
from language_models.small import DEEPSEEK, EXPERTS, LLAMA

# Written down from `shared/modeling/src/models/llama.rs` and `attention.rs` for 64 wide, 4 heads, 2 of keys and values.
LLAMA_LAYER = {
    "input_layernorm.weight": (64,),
    "mlp.down_proj.weight": (64, 128),
    "mlp.gate_proj.weight": (128, 64),
    "mlp.up_proj.weight": (128, 64),
    "post_attention_layernorm.weight": (64,),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.v_proj.weight": (32, 64),
}

# From `shared/modeling/src/models/deepseek.rs`: 4 heads of 16 + 8, latents of 32 and 16, values of 16.
DEEPSEEK_LAYER = {
    "input_layernorm.weight": (64,),
    "mlp.down_proj.weight": (64, 128),
    "mlp.gate_proj.weight": (128, 64),
    "mlp.up_proj.weight": (128, 64),
    "post_attention_layernorm.weight": (64,),
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_a_proj_with_mqa.weight": (24, 64),
    "self_attn.kv_b_proj.weight": (128, 16),
    "self_attn.o_proj.weight": (64, 64),
    "self_attn.q_a_layernorm.weight": (32,),
    "self_attn.q_a_proj.weight": (32, 64),
    "self_attn.q_b_proj.weight": (96, 32),
}


def shapes_of(model: CausalLM) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in model.sorted_parameters().items()]


def expected(layer: dict[str, tuple[int, ...]], layers: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    return [
        ("lm_head.weight", (96, 64)),
        ("model.embed_tokens.weight", (96, 64)),
        *((f"model.layers.{number}.{name}", shape) for number in layers for name, shape in layer.items()),
        ("model.norm.weight", (64,)),
    ]


def test_a_llama_has_those_of_psyche() -> None:
    assert shapes_of(CausalLM(LLAMA, "HfLlama")) == expected(LLAMA_LAYER, [0, 1])


@pytest.mark.slow
def test_a_deepseek_has_those_of_psyche() -> None:
    assert shapes_of(CausalLM(DEEPSEEK, "HfDeepseek")) == expected(DEEPSEEK_LAYER, [0, 1])


@pytest.mark.slow
def test_a_deepseek_with_plain_queries_has_one_projection_for_them() -> None:
    names = dict(shapes_of(CausalLM({**DEEPSEEK, "q_lora_rank": None}, "HfDeepseek")))
    assert names["model.layers.0.self_attn.q_proj.weight"] == (96, 64)
    assert not any(".q_a_" in name or ".q_b_" in name for name in names)


@pytest.mark.slow
def test_layer_ten_comes_before_layer_two() -> None:
    model = CausalLM({**LLAMA, "num_hidden_layers": 11}, "HfLlama")
    assert shapes_of(model) == expected(LLAMA_LAYER, [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9])
    assert [name for name, _ in model.named_parameters()] != list(model.sorted_parameters())


def test_the_optimizer_has_the_order_of_the_names_and_not_that_of_the_module() -> None:
    model = CausalLM(LLAMA, "HfLlama")
    [group] = model.make_optimizer(lr=1e-3).param_groups
    wanted = model.sorted_parameters()
    assert not TORCH_KEEPS_NAMES or group["param_names"] == list(wanted)
    assert all(a is b for a, b in zip(group["params"], wanted.values(), strict=True))


def test_names_in_the_module_and_in_its_state_have_no_prefix() -> None:
    model = CausalLM(LLAMA, "HfLlama")
    assert set(dict(model.named_parameters())) == set(model.state_dict()) == set(model.sorted_parameters())


def test_rotary_frequencies_are_in_no_list_and_the_same_on_every_way_to_a_model() -> None:
    config = read_config(LLAMA, "HfLlama")
    fresh = CausalLM(config)
    auto = CausalLM(LLAMA, "HfAuto")
    assert not any("inv_freq" in name for name in fresh.tensors())
    for model in (fresh, auto):
        frequencies = dict(model.named_buffers())["model.rotary_emb.inv_freq"]
        assert frequencies.dtype == torch.float32
        wanted = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(frequencies, wanted, rtol=1e-5, atol=0)


def test_tied_embeddings_of_a_model_of_transformers_are_two_parameters_as_in_psyche() -> None:
    model = CausalLM({**LLAMA, "tie_word_embeddings": True}, "HfAuto")
    names = model.sorted_parameters()
    assert list(names) == list(CausalLM(LLAMA, "HfLlama").sorted_parameters())
    assert names["lm_head.weight"].data_ptr() != names["model.embed_tokens.weight"].data_ptr()
    assert model.config.values["tie_word_embeddings"] is False


def test_models_of_other_kinds_train_under_their_names_in_transformers() -> None:
    config = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    names = list(CausalLM(config, "HfAuto").sorted_parameters())
    assert names == sorted(names)
    assert {"lm_head.weight", "transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"} <= set(names)


def test_routing_biases_belong_to_the_model_and_are_not_trained() -> None:
    model = CausalLM(EXPERTS, "HfAuto")
    extra = set(model.tensors()) - set(model.sorted_parameters())
    assert extra == {"model.layers.1.mlp.gate.e_score_correction_bias"}


def test_shapes_alone_take_no_memory_and_agree_with_the_model() -> None:
    config = read_config(DEEPSEEK, "HfDeepseek")
    shapes = sorted_parameters(build_shapes(config))
    assert all(p.device.type == "meta" for p in shapes.values())
    assert [(name, tuple(p.shape)) for name, p in shapes.items()] == shapes_of(CausalLM(config))


def test_the_dummy_model_has_the_twelve_of_psyche_and_no_gradient() -> None:
    model = DummyModel()
    assert [name for name, _ in sorted(model.named_parameters())] == list(DUMMY_PARAMETERS)
    loss = model(torch.zeros(2, 8))
    loss.backward()
    assert loss.item() == 1.0
    assert all(p.dtype == torch.float32 and p.shape == (1,) and float(p.grad) == 0.0 for p in model.parameters())  # type: ignore[arg-type]
