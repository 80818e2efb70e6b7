"""Names and shapes of the parameters of Psyche's own Llama and DeepSeek, written down from its code.

transformers makes these models here, and what it calls a part or how it lays it out is its own affair: version 5 has
already joined the experts of a layer into one tensor. For the two models that Psyche's peers run on their own code,
a run leaves no choice, so what was made is compared with what they have.

From PsycheFoundation/psyche ``shared/modeling/src/models/llama.rs``, ``attention.rs`` and ``deepseek.rs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..coordinator.model import LLMArchitecture
from ..errors import ModelConfigError
from .config import LanguageModelConfig

__all__ = ["check_native_shapes", "native_shapes"]

Shapes = dict[str, tuple[int, ...]]


def native_shapes(config: LanguageModelConfig) -> Shapes:
    """Shape of each parameter by name, in the order of Psyche's peers, for a Llama or a dense DeepSeek-V3.

    Args:
        config: of the architecture ``HF_LLAMA`` or ``HF_DEEPSEEK``.
    """
    values = config.values
    hidden, inner = values["hidden_size"], values["intermediate_size"]
    attention = _llama_attention if config.architecture is LLMArchitecture.HF_LLAMA else _deepseek_attention
    layer: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        **{f"self_attn.{name}": shape for name, shape in attention(values).items()},
    }
    shapes: Shapes = {
        "lm_head.weight": (values["vocab_size"], hidden),
        "model.embed_tokens.weight": (values["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for number in range(values["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return {name: shapes[name] for name in sorted(shapes, key=str.encode)}


def check_native_shapes(config: LanguageModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Compares a model that was made with the one that the peers of a run have.

    Args:
        found: shape of each parameter by name, in the order in which they are trained.

    Raises:
        ModelConfigError: one is missing, too many, of another shape or in another place.
    """
    wanted = native_shapes(config)
    for name, shape in wanted.items():
        if found.get(name) != shape:
            has = f"of shape {found[name]}" if name in found else "not at all"
            raise _differs(config, name, f"makes {name} {has}", f"have it of shape {shape}")
    for name in found:
        if name not in wanted:
            raise _differs(config, name, f"makes {name}", "do not have it")
    for place, name in zip(wanted, found, strict=True):
        if place != name:
            raise _differs(config, name, f"has {name} where {place} belongs", "have another order")


def _llama_attention(values: Mapping[str, Any]) -> Shapes:
    hidden = values["hidden_size"]
    shared = hidden // values["num_attention_heads"] * values["num_key_value_heads"]
    return {
        "q_proj.weight": (hidden, hidden),
        "k_proj.weight": (shared, hidden),
        "v_proj.weight": (shared, hidden),
        "o_proj.weight": (hidden, hidden),
    }


def _deepseek_attention(values: Mapping[str, Any]) -> Shapes:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    plain, rotary, wide = values["qk_nope_head_dim"], values["qk_rope_head_dim"], values["v_head_dim"]
    queries, latent = values["q_lora_rank"], values["kv_lora_rank"]
    shapes: Shapes = {
        "kv_a_layernorm.weight": (latent,),
        "kv_a_proj_with_mqa.weight": (latent + rotary, hidden),
        "kv_b_proj.weight": (heads * (plain + wide), latent),
        "o_proj.weight": (hidden, heads * wide),
    }
    if queries is None:
        shapes["q_proj.weight"] = (heads * (plain + rotary), hidden)
    else:
        shapes["q_a_proj.weight"] = (queries, hidden)
        shapes["q_a_layernorm.weight"] = (queries,)
        shapes["q_b_proj.weight"] = (heads * (plain + rotary), queries)
    if values["attention_bias"]:
        shapes |= {"q_a_proj.bias": (queries,), "kv_a_proj_with_mqa.bias": (latent + rotary,), "o_proj.bias": (hidden,)}
    return shapes


def _differs(config: LanguageModelConfig, name: str, here: str, there: str) -> ModelConfigError:
    from transformers import __version__

    return ModelConfigError(
        f"transformers {__version__} {here}, and the peers of an {config.architecture.value} run {there}: install "
        "another version of transformers, such as 5.23",
        name=name,
    )
