"""A peer's config.json is bounded before transformers sees it."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from distro_optim.errors import ModelConfigError
from distro_optim.models.config import packaged_configs, read_config
from distro_optim.models.strangers import FAMILIES, check_strangers_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "n_routed_experts": 256, "vocab_size": 129280}


@pytest.mark.parametrize("values", [LLAMA, DEEPSEEK_V3], ids=["llama", "deepseek"])
def test_known_models_pass(values: dict[str, Any]) -> None:
    check_strangers_config(values)


@pytest.mark.parametrize("name", packaged_configs())
def test_what_comes_with_the_package_passes(name: str) -> None:
    check_strangers_config(read_config(name, "HfLlama" if "llama" in name else "HfAuto").values)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "jamba", "num_hidden_layers": 1000, "num_experts": 99},
        {"model_type": ["llama"]},
        {"model_type": "x" * 10_000},
        {"num_hidden_layers": 1000},
        {"num_hidden_layers": 500, "num_local_experts": 99},
        {"max_window_layers": 10**6},
        {"num_attention_heads": 5000},
        {"head_dim": 1 << 20},
        {"intermediate_size": 1 << 20},
        {"max_position_embeddings": 1 << 28},
        {"rope_theta": 1e300},
        {"num_labels": 1 << 29},
        {"num_hidden_layers": 10**400},
        {"layers": [10**400]},
        {"layer_types": ["full_attention"] * 5000},
        {"rope_scaling": {"short_factor": [1.0] * 5000}},
        {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {"i": 1}}}}}}}}},
        {"architectures": ["x" * 2000]},
        {"\x1b[31m\n": 1 << 40},
        {"k" * 2000: 1},
        {"num_hidden_layers": float("inf")},
    ],
    ids=lambda change: next(iter(change))[:20].encode("unicode_escape").decode(),
)
def test_what_is_beyond_any_model_is_refused_before_anything_is_built(change: dict[str, Any]) -> None:
    with pytest.raises(ModelConfigError) as caught:
        check_strangers_config({**LLAMA, **change})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_peers_configuration_is_read_with_these_bounds_and_ones_own_is_not() -> None:
    values = {**LLAMA, "num_hidden_layers": 600}
    read_config(values)
    with pytest.raises(ModelConfigError, match=r"a peer's config\.json is beyond any model: layers is 600"):
        read_config(values, from_peer=True)


def test_each_family_is_a_causal_language_model_of_transformers() -> None:
    mapping = pytest.importorskip("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert {"llama", "deepseek_v3", "gpt2", "mistral"} <= FAMILIES
    assert {"llama", "gpt2", "mistral"} <= mapping.keys()
    assert ("deepseek_v3" in mapping) == hasattr(transformers, "DeepseekV3ForCausalLM")  # not in the oldest versions
    assert len(FAMILIES & mapping.keys()) > len(FAMILIES) // 2


def test_what_a_peer_says_of_its_model_beside_it_is_not_given_to_transformers() -> None:
    beside = {"distro_optim": {"format": 2, "trained": [["weight", [1, 2]]] * 5000}}
    assert "distro_optim" not in read_config({**LLAMA, **beside}, from_peer=True).values
