"""What a peer's ``config.json`` may ask of transformers: known families, and bounds on what is built. No I/O.

A configuration class may make lists and modules of whatever length a number says before a shape is known, so what comes
from a peer is bounded before transformers sees it. Files of one's own are not: see :mod:`.config`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ModelConfigError

__all__ = ["FAMILIES", "OUR_ENTRY", "check_strangers_config"]

FAMILIES: Final = frozenset(
    [
        "bloom",
        "codegen",
        "cohere",
        "cohere2",
        "deepseek_v2",
        "deepseek_v3",
        "falcon",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gpt_oss",
        "gptj",
        "granite",
        "granitemoe",
        "helium",
        "llama",
        "mistral",
        "mixtral",
        "mpt",
        "nemotron",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "opt",
        "persimmon",
        "phi",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    ]
)
"""Causal language models of transformers whose classes make one list of layers and, in each, one of experts. Others,
such as those that mix kinds of layers by rules of their own, are trained from a configuration of one's own."""

OUR_ENTRY: Final = "distro_optim"
"""What a peer of our kind says of its model beside the configuration. It has its own bounds
(``strategy/model/identity.py``), and transformers does not see it."""

MAX_ITEMS: Final = 4096
"""Values in the whole file, of all lists and objects; the largest known has some hundred. Chosen arbitrarily."""

MAX_DEPTH: Final = 4
MAX_TEXT: Final = 1024

MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 32_768
"""Experts of all layers: twice those of DeepSeek-V3."""

MAX_COUNT: Final = 4096
"""Of heads, groups and the like."""

MAX_WIDTH: Final = 1 << 18
MAX_VOCABULARY: Final = 1 << 22
MAX_NUMBER: Final = 1 << 27
"""Of any other number, such as positions."""

_NOT_A_LANGUAGE_MODELS: Final = frozenset(
    [
        "num_labels",
        "id2label",
        "label2id",
        "pruned_heads",
        "task_specific_params",
        "decoder",
        "encoder",
        "text_config",
        "vision_config",
        "audio_config",
        "backbone_config",
        "prefix",
        "finetuning_task",
        "problem_type",
    ]
)
"""Fields of transformers' base class that make lists of labels or models within models."""

_LAYERS: Final = re.compile(r"(^|_)(n_layers?|num_(hidden_)?layers|depth|n_blocks|first_k_dense_replace)$|_layers$")
_EXPERTS: Final = re.compile(r"experts$")
_WIDTHS: Final = re.compile(r"(_size|_dim|_rank|^n_embd|^n_inner|^d_model|^d_ff|_width)$")


def check_strangers_config(values: Mapping[str, Any]) -> None:
    """Raises ModelConfigError if a peer's configuration is of no known family, or larger than any model."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelConfigError(
            f"a peer's model is a {str(family)[:40]!r}, which is built only from a configuration of your own: "
            "get the run's model from its host, and join with --model and its folder",
            name="model_type",
            value=family,
        )
    for name in sorted(_NOT_A_LANGUAGE_MODELS & values.keys()):
        raise ModelConfigError(f"a peer's config.json has {name}, which no language model needs", name=name)
    _check_items(values)
    layers = _largest(values, _LAYERS, MAX_LAYERS)
    experts = _largest(values, _EXPERTS, MAX_EXPERTS)
    if layers * experts > MAX_EXPERTS:
        raise _too_large("experts", layers * experts)


def _check_items(whole: Mapping[str, Any]) -> None:
    """Bounds the file as a whole, and each number by what it counts."""
    items = 0
    waiting: list[tuple[str, Any, int]] = [(name, value, 1) for name, value in whole.items()]
    while waiting:
        name, value, depth = waiting.pop()
        items += 1
        if items > MAX_ITEMS or depth > MAX_DEPTH or len(name) > MAX_TEXT:
            raise _too_large("config.json", items)
        if isinstance(value, Mapping):
            waiting += [(str(key), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            if len(value) > MAX_TEXT:
                raise _too_large(name, len(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > _bound_of(name):
            raise _too_large(name, value)


def _bound_of(name: str) -> int:
    if name == "vocab_size":
        return MAX_VOCABULARY
    if _WIDTHS.search(name):
        return MAX_WIDTH
    if "head" in name or "group" in name:
        return MAX_COUNT
    return MAX_NUMBER


def _largest(values: Mapping[str, Any], names: re.Pattern[str], bound: int) -> int:
    found = [
        value
        for name, value in values.items()
        if names.search(name) and isinstance(value, int) and not isinstance(value, bool)
    ]
    most = max(found, default=1)
    if most > bound:
        raise _too_large("layers" if bound == MAX_LAYERS else "experts", most)
    return max(most, 1)


def _too_large(name: str, value: float) -> ModelConfigError:
    shown = name if name.isprintable() else ascii(name)
    return ModelConfigError(
        f"a peer's config.json is beyond any model: {shown[:60]} is {value:.6g}", name=shown[:60], value=value
    )
