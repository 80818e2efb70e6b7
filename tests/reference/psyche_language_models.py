"""Psyche's own Llama and DeepSeek as plain functions of a dict of weights, and nothing of transformers.

Formulas: PsycheFoundation/psyche ``shared/modeling/src/models/llama.rs``, ``deepseek.rs``, ``attention.rs``,
``rope.rs``, ``rms_norm.rs``, ``causal_language_model.rs``. With ``lengths`` as flash attention computes it there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def logits(config: Mapping[str, Any], w: Weights, tokens: Tensor, positions: Tensor | None, lengths: Any) -> Tensor:
    """``(batch, tokens, vocabulary)``."""
    deepseek = "kv_lora_rank" in config
    rope_width = config["qk_rope_head_dim"] if deepseek else config["hidden_size"] // config["num_attention_heads"]
    turns = _turns(tokens, positions, rope_width, config["rope_theta"])
    visible = _visible(tokens, lengths)
    x = w["model.embed_tokens.weight"][tokens]
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        own = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"model.layers.{layer}.")}
        attend = _mla if deepseek else _grouped
        x = x + attend(config, own, _norm(x, own["input_layernorm.weight"], eps), turns, visible)
        y = _norm(x, own["post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(y @ own["mlp.gate_proj.weight"].T)
        x = x + (gate * (y @ own["mlp.up_proj.weight"].T)) @ own["mlp.down_proj.weight"].T
    return _norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The mean over positions, one by one, at which the label of the next one counts."""
    found = []
    for row, wanted in zip(scores.float(), labels, strict=True):
        for t in range(len(wanted) - 1):
            if int(wanted[t + 1]) != -100:
                found.append(torch.logsumexp(row[t], 0) - row[t, wanted[t + 1]])
    return torch.stack(found).mean()


def _grouped(config: Mapping[str, Any], w: Weights, x: Tensor, turns: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    q, k, v = (
        _split(x @ w[f"self_attn.{part}_proj.weight"].T, count)
        for part, count in (("q", heads), ("k", groups), ("v", groups))
    )
    q, k = _rotate(q, turns), _rotate(k, turns)
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
    return _attend(q, k, v, visible) @ w["self_attn.o_proj.weight"].T


def _mla(config: Mapping[str, Any], w: Weights, x: Tensor, turns: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    if config.get("q_lora_rank"):
        small = _norm(x @ w["self_attn.q_a_proj.weight"].T, w["self_attn.q_a_layernorm.weight"], eps)
        q = _split(small @ w["self_attn.q_b_proj.weight"].T, heads)
    else:
        q = _split(x @ w["self_attn.q_proj.weight"].T, heads)
    joint = x @ w["self_attn.kv_a_proj_with_mqa.weight"].T
    latent = _norm(joint[..., :rank], w["self_attn.kv_a_layernorm.weight"], eps)
    kv = _split(latent @ w["self_attn.kv_b_proj.weight"].T, heads)
    turned_q = _rotate(_pairs_apart(q[..., nope:]), turns)
    turned_k = _rotate(_pairs_apart(joint[..., rank:][:, None]), turns).expand(-1, heads, -1, -1)
    q = torch.cat([q[..., :nope], turned_q], -1)
    k = torch.cat([kv[..., :nope], turned_k], -1)
    assert q.shape[-1] == nope + rope
    return _attend(q, k, kv[..., nope:], visible) @ w["self_attn.o_proj.weight"].T


def _split(x: Tensor, heads: int) -> Tensor:
    parts: Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    shares = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    mixed: Tensor = (shares @ v).transpose(1, 2).flatten(2)
    return mixed


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = x.float()
    return weight * (exact * (exact.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _turns(tokens: Tensor, positions: Tensor | None, width: int, theta: float) -> tuple[Tensor, Tensor]:
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    frequencies = torch.tensor([1 / theta ** (i / width) for i in range(0, width, 2)], dtype=torch.float32)
    angles = (positions.float()[..., None] * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t.to(x.dtype) for t in turns)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _pairs_apart(x: Tensor) -> Tensor:
    """Neighbours (0, 1), (2, 3), ... become halves (0, 2, ...), (1, 3, ...)."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def _visible(tokens: Tensor, lengths: Sequence[Sequence[int]] | None) -> Tensor:
    rows, count = tokens.shape
    visible = torch.zeros(rows, count, count, dtype=torch.bool)
    for row in range(rows):
        start = 0
        for length in lengths[row] if lengths is not None else [count]:
            for t in range(start, start + length):
                visible[row, t, start : t + 1] = True
            start += length
    return visible
