"""What a peer's ``config.json`` may ask of transformers: bounds on every number, list and text. No I/O.

A configuration class may make lists and modules of whatever length a number says before a shape is known, so what comes
from a peer is bounded before transformers sees it. Files of one's own are not: see :mod:`.config`.

That is enough for families whose classes make what the numbers say, once. Psyche's client takes every family that its
transformers has, and some multiply numbers, repeat patterns, or hold models within models. What they make of a peer's
numbers is tried in a process with limits first: :mod:`.trial`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ..errors import ModelConfigError
from ..words import shown

__all__ = ["FAMILIES", "OUR_ENTRY", "check_strangers_config", "is_base", "is_ordinary"]

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
"""Causal language models of transformers whose classes make one list of layers and, in each, one of experts. Others mix
kinds of layers by rules of their own."""

OUR_ENTRY: Final = "distro_optim"
"""What a peer of our kind says of its model beside the configuration. It has its own bounds
(``strategy/model/identity.py``), and transformers does not see it."""

MAX_ITEMS: Final = 4096
"""Values in the whole file, of all lists and objects; the largest known has some hundred. Chosen arbitrarily."""

MAX_DEPTH: Final = 8
"""Three more than the lists of a rope of one kind of layers of a text model within a model."""

MAX_TEXT: Final = 1024
MAX_FAMILY: Final = 64

MAX_LAYERS: Final = 512
MAX_EXPERTS: Final = 32_768
"""Experts of all layers: twice those of DeepSeek-V3. Of families whose classes make a module of each; Doge has 16,384
in each layer, as rows of one table."""

MAX_COUNT: Final = 4096
"""Of heads, groups, repetitions and the like."""

MAX_WIDTH: Final = 1 << 19
MAX_VOCABULARY: Final = 1 << 22
MAX_NUMBER: Final = 1 << 27
"""Of any other number, such as positions."""

MAX_BASE: Final = 1 << 60
"""Of the base of rotary frequencies and of limits on values, of which nothing is made; Falcon-H1's has 12 digits."""

_WITHIN: Final = frozenset(
    [
        "audio_config",
        "backbone_config",
        "decoder",
        "encoder",
        "pruned_heads",
        "text_config",
        "vision_config",
    ]
)
"""What makes models within models, or changes one that was made. Psyche's client sends what its transformers knows of a
configuration, whatever the family, so these are often there and empty."""

_LAYERS: Final = re.compile(r"(^|_)(n_layers?|num_(hidden_)?layers|depth|n_blocks|first_k_dense_replace)$|_layers$")
_EXPERTS: Final = re.compile(r"experts$")
_WIDTHS: Final = re.compile(r"(_size|_dim|_rank|^n_embd|^n_inner|^d_model|^d_ff|_width)$")
_COUNTS: Final = re.compile(r"head|group|cycle|loop|repeat|num_labels|num_blocks")
_BASES: Final = re.compile(r"(^|_)(theta|base|base_freq|clipping)$")


def is_ordinary(values: Mapping[str, Any]) -> bool:
    """Whether transformers makes of a configuration that is within bounds no more than its numbers say."""
    return values.get("model_type") in FAMILIES and not any(values.get(name) for name in _WITHIN)


def check_strangers_config(values: Mapping[str, Any]) -> None:
    """Raises ModelConfigError if a peer's configuration is larger than any model, or names no family."""
    family = values.get("model_type")
    if not isinstance(family, str) or len(family) > MAX_FAMILY or not family.isprintable():
        raise ModelConfigError(
            f"a peer's model is of the kind {shown(str(family), 40)!r}, which is none: get the run's "
            "model from its host, and join with --model and its folder",
            name="model_type",
            value=family,
        )
    layers = experts = items = 1
    waiting: list[tuple[str, Any, int]] = [(name, value, 1) for name, value in values.items()]
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
        elif isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value)
            if isinstance(value, int):
                layers = max(layers, value if _LAYERS.search(name) else 1)
                experts = max(experts, value if _EXPERTS.search(name) else 1)
    if layers > MAX_LAYERS:
        raise _too_large("layers", layers)
    if layers * experts > MAX_EXPERTS and is_ordinary(values):
        raise _too_large("experts", layers * experts)


def is_base(name: str) -> bool:
    """Whether a number of this name is a base of rotary frequencies or the like: large, and nothing is made of it."""
    return _BASES.search(name) is not None


def _check_number(name: str, value: float) -> None:
    if not abs(value) <= _bound_of(name):
        raise _too_large(name, value)


def _bound_of(name: str) -> int:
    if name == "vocab_size":
        return MAX_VOCABULARY
    if "vocab" in name:  # tables of Qwen's n-grams and Blt's bytes
        return MAX_NUMBER
    if _WIDTHS.search(name):
        return MAX_WIDTH
    if _COUNTS.search(name):
        return MAX_COUNT
    return MAX_BASE if is_base(name) else MAX_NUMBER


def _too_large(name: str, value: float) -> ModelConfigError:
    try:
        figure = f"{value:.6g}"
    except OverflowError:
        figure = "more than any float"
    return ModelConfigError(
        f"a peer's config.json is beyond any model: {shown(name, 60)} is {figure}", name=shown(name, 60), value=figure
    )
