"""A small decoder-only transformer that predicts the next byte."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ByteTransformer", "next_byte_loss"]

VOCABULARY = 256
# As in GPT-2. Small enough that the first loss is that of a fair guess, ln 256 = 5.55 nats per byte.
INITIAL_STD = 0.02


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.hidden_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        packed = self.query_key_value(self.attention_norm(x))
        query, key, value = packed.view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        y: Tensor = self.hidden_out(F.gelu(self.hidden(self.hidden_norm(x))))
        return x + y


class ByteTransformer(nn.Module):
    """Bytes ``(batch, time) int64`` to logits ``(batch, time, 256)``; ``time`` is at most ``context``."""

    def __init__(self, *, width: int = 128, layers: int = 4, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.RMSNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)
        self.logits.weight = self.bytes.weight  # tied, as in GPT-2
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        logits: Tensor = self.logits(self.norm(self.blocks(self.bytes(x) + self.positions(places))))
        return logits


def next_byte_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte; both tensors are ``(batch, time) int64``."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
