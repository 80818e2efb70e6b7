"""``config.json`` as people, transformers and Psyche's clients write it; what is wrong is told in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.coordinator.model import LLMArchitecture
from distro_optim.errors import ConfigurationError, ModelConfigError
from distro_optim.models.building import build_shapes
from distro_optim.models.causal_lm import CausalLM
from distro_optim.models.config import packaged_configs, read_config
from language_models.small import DEEPSEEK, EXPERTS, IS_OLD, LLAMA, SMALL, sentences

#: What a client of Psyche sends that got its Llama from peers: `serde_json::to_string` of `LlamaConfig`.
FROM_SERDE = {
    **{key: value for key, value in LLAMA.items() if key != "model_type"},
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_scaling": None,
    "attention_bias": None,
}


@pytest.mark.parametrize(("architecture", "config"), [*SMALL.items(), ("HfAuto", EXPERTS)])
def test_a_config_is_read_from_a_mapping_from_text_from_a_file_and_from_a_folder(
    tmp_path: Path, architecture: str, config: dict[str, Any]
) -> None:
    text = json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    read = [read_config(source, architecture) for source in (config, text, tmp_path / "config.json", str(tmp_path))]
    assert all(found == read[0] for found in read)
    assert read[0].architecture is LLMArchitecture(architecture)
    assert read_config(read[0].to_json(), architecture) == read[0]


def test_a_config_of_a_psyche_client_has_no_model_type_and_nulls() -> None:
    assert CausalLM(json.dumps(FROM_SERDE), "HfLlama").config.model_type == "llama"


def test_nulls_of_scaled_rotary_embeddings_are_left_out() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_type": "llama3",
        "beta_fast": None,
        "beta_slow": None,
        "mscale": None,
        "mscale_all_dim": None,
    }
    model = CausalLM({**FROM_SERDE, "rope_scaling": scaling}, "HfLlama")
    assert "beta_fast" not in model.config.values["rope_scaling"]
    plain, scaled = (dict(m.named_buffers())["model.rotary_emb.inv_freq"] for m in (CausalLM(LLAMA, "HfLlama"), model))
    assert not torch.equal(plain, scaled)


def test_rope_parameters_of_transformers_5_become_what_psyche_reads() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    values = read_config(config, "HfLlama").values
    assert (values["rope_theta"], values["rope_scaling"]) == (500000.0, None)
    assert "rope_parameters" not in values


@pytest.mark.parametrize("architecture", SMALL)
def test_what_psyche_cannot_do_without_is_written(architecture: str) -> None:
    values = json.loads(read_config(SMALL[architecture], architecture).to_json())
    # The fields of `LlamaConfig` and `DeepseekConfig` that are no Option, and those that are unwrapped.
    wanted = {"hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"}
    wanted |= {"rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "attention_bias"}
    assert wanted <= {key for key, value in values.items() if value is not None}


@pytest.mark.parametrize("experts", [{}, {"n_routed_experts": None, "n_group": None, "norm_topk_prob": None}])
def test_a_deepseek_without_experts_is_dense(experts: dict[str, Any]) -> None:
    model = CausalLM({**DEEPSEEK, **experts}, "HfDeepseek")
    assert "model.layers.1.mlp.up_proj.weight" in model.sorted_parameters()
    assert "n_routed_experts" not in model.config.values


def test_the_sequence_length_of_the_run_counts() -> None:
    assert read_config(LLAMA, "HfLlama", max_seq_len=1024).values["max_position_embeddings"] == 1024


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("HfLlama", {"tie_word_embeddings": True}, "ties its embeddings"),
        ("HfLlama", {"attention_bias": True}, "attention_bias"),
        ("HfLlama", {"mlp_bias": True}, "mlp_bias"),
        ("HfLlama", {"head_dim": 32}, "divides the hidden size evenly"),
        ("HfLlama", {"num_attention_heads": 5}, "divides the hidden size evenly"),
        ("HfLlama", {"num_key_value_heads": 3}, "does not divide"),
        ("HfLlama", {"hidden_act": "gelu"}, "computes silu"),
        ("HfLlama", {"hidden_size": None}, "hidden_size is missing"),
        ("HfLlama", {"vocab_size": 0}, "vocab_size is 0"),
        ("HfLlama", {"vocab_size": "96"}, "vocab_size is '96'"),
        ("HfLlama", {"num_hidden_layers": True}, "num_hidden_layers is True"),
        ("HfLlama", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
        ("HfLlama", {"model_type": "qwen2"}, "describes a 'qwen2'"),
        ("HfLlama", {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ("HfLlama", {"num_hidden_layers": 10**6}, "beyond any model"),
        ("HfLlama", {"hidden_size": 1 << 40}, "beyond any model"),
        ("HfDeepseek", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("HfDeepseek", {"n_routed_experts": 8, "first_k_dense_replace": 1}, "has 8 experts"),
        ("HfDeepseek", {"q_lora_rank": None, "attention_bias": True}, "attention_bias without q_lora_rank"),
        ("HfDeepseek", {"v_head_dim": 64}, "v_head_dim"),
        ("HfAuto", {"model_type": None}, "has no model_type"),
        ("HfAuto", {"model_type": "no-such-model"}, "no causal language model"),
        ("HfAuto", {"model_type": "vit"}, "no causal language model"),
        pytest.param(
            *("HfAuto", {"rms_norm_eps": "a lot"}, "config.json"),
            marks=pytest.mark.skipif(IS_OLD, reason="transformers 4 does not look at types"),
        ),
        ("Torchtitan", {}, "Torchtitan"),
        ("HfNothing", {}, "give one of HfLlama, HfDeepseek, HfAuto"),
    ],
)
def test_a_wrong_config_is_refused_with_one_sentence(architecture: str, change: dict[str, Any], words: str) -> None:
    config = {**(DEEPSEEK if architecture == "HfDeepseek" else LLAMA), **change}
    with pytest.raises(ModelConfigError) as caught:
        CausalLM(config, architecture)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert len(message) < 500


def test_a_missing_config_is_told_with_the_path_and_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ModelConfigError, match=r"config\.json is not there: give a folder that holds config\.json"):
        read_config(tmp_path, "HfLlama")
    with pytest.raises(ConfigurationError, match="no-such-folder is not there"):
        CausalLM(tmp_path / "no-such-folder")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN}', "{" + '"a":{' * 100_000, "\x00"])
def test_a_file_that_is_no_json_object_is_malformed(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelConfigError, match="malformed"):
        read_config(tmp_path, "HfLlama")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(ModelConfigError, match="larger than"):
        read_config(tmp_path, "HfLlama")


def test_names_of_code_and_kernels_are_dropped() -> None:
    hostile = {
        **LLAMA,
        "auto_map": {"AutoModelForCausalLM": "stranger/repo--evil.Model"},
        "_attn_implementation": "stranger/kernels",
        "attn_implementation": "stranger/kernels",
        "_name_or_path": "stranger/repo",
        "use_kernels": True,
    }
    for architecture in ("HfLlama", "HfAuto"):
        model = CausalLM(hostile, architecture)
        assert not set(model.config.values) & (set(hostile) - set(LLAMA))
        assert model(sentences(1)).loss.isfinite()


WORDS = st.sampled_from(["", "a", "silu", "default", "rope_type", "rope_theta", "factor"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*EXPERTS, "rope_scaling", "rope_parameters", "head_dim", "torch_dtype", "hidden_act"])


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["HfLlama", "HfDeepseek", "HfAuto"]), st.dictionaries(KEYS, JSON, max_size=4))
def test_whatever_a_config_says_it_is_read_or_refused(architecture: str, change: dict[str, Any]) -> None:
    base = DEEPSEEK if architecture == "HfDeepseek" else LLAMA
    try:
        config = read_config(json.dumps({**base, **change}), architecture)
    except ModelConfigError:
        return
    assert read_config(config.to_json(), architecture).values == config.values
    layers = config.values["num_hidden_layers"]  # HfAuto takes None for the default, which is large
    if layers is None or (isinstance(layers, int) and layers > 8):
        return  # each layer takes its time
    try:
        shapes = build_shapes(config)
    except ModelConfigError:
        return
    assert all(p.device.type == "meta" for p in shapes.parameters())


def test_the_packaged_configs_can_be_read() -> None:
    assert packaged_configs() == ("consilience-40b", "llama-20m")
    assert read_config("consilience-40b", "HfDeepseek").model_type == "deepseek_v3"
    assert read_config("llama-20m", "HfLlama").model_type == "llama"
