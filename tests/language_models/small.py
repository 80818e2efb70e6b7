"""Models of a few thousand parameters, and data that they can learn."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers
from torch import Tensor

IS_OLD: Final = transformers.__version__.startswith("4.")
OLD: Final = "transformers 4 does not part documents by their positions, and returns logits in float32"

LLAMA: Final[dict[str, Any]] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

DEEPSEEK: Final[dict[str, Any]] = {
    "model_type": "deepseek_v3",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "attention_bias": False,
}

EXPERTS: Final[dict[str, Any]] = {
    **DEEPSEEK,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}

SMALL: Final = {"HfLlama": LLAMA, "HfDeepseek": DEEPSEEK}


def sentences(rows: int, tokens: int = 32, seed: int = 0, vocabulary: int = 96) -> Tensor:
    """``(rows, tokens) int64``: each counts upwards by a step of its own, so that the next token can be known."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(vocabulary, (rows, 1), generator=generator)
    step = torch.randint(1, 4, (rows, 1), generator=generator)
    return (start + step * torch.arange(tokens)) % vocabulary
