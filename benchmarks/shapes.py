"""Parameter shapes of the models the benchmarks use, and what peers send of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distro_optim.compress import CompressedUpdate, TilePlan

__all__ = ["MODELS", "gpt2_small", "llama_1b", "llama_20m", "make_params", "one_tensor", "random_updates"]


def gpt2_small() -> list[tuple[int, ...]]:
    """GPT-2 small, 124M: biases included, vocabulary filled up to 50304, input and output embedding tied."""
    shapes: list[tuple[int, ...]] = [(50304, 768), (1024, 768)]
    for _ in range(12):
        shapes += [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
        shapes += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [*shapes, (768,), (768,)]


def llama_20m() -> list[tuple[int, ...]]:
    """A Llama of 22.7M: hidden 256, 8 layers, feed-forward 688 (whose tiles are 43 wide under the divisor rule)."""
    shapes: list[tuple[int, ...]] = [(32000, 256)]
    for _ in range(8):
        shapes += [(256, 256)] * 4 + [(688, 256), (688, 256), (256, 688), (256,), (256,)]
    return [*shapes, (256,), (32000, 256)]


def llama_1b() -> list[tuple[int, ...]]:
    """A Llama of 1.24 billion: hidden 2048, 16 layers, input and output embedding tied."""
    shapes: list[tuple[int, ...]] = [(128256, 2048)]
    for _ in range(16):
        shapes += [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)]
        shapes += [(2048,), (2048,)]
    return [*shapes, (2048,)]


def one_tensor() -> list[tuple[int, ...]]:
    """As many elements as GPT-2 small, in one tensor."""
    return [(sum(torch.Size(s).numel() for s in gpt2_small()) // 768, 768)]


MODELS = {"20M": llama_20m, "124M": gpt2_small}


def make_params(shapes: list[tuple[int, ...]], seed: int = 0) -> list[torch.nn.Parameter]:
    """Gaussian weights of standard deviation 0.02 with Gaussian gradients of 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def random_updates(
    plan: TilePlan, count: int, to_values: Callable[[Tensor], Tensor] = lambda signs: signs
) -> list[CompressedUpdate]:
    """Updates of ``count`` peers, with distinct random positions in each tile.

    Args:
        plan: of the tensors.
        count: of peers.
        to_values: makes of random signs, ``(n, k) bool``, what is sent; by default these themselves.
    """
    generator = torch.Generator().manual_seed(1)
    updates = []
    for _ in range(count):
        index: list[Tensor] = []
        value: list[Tensor] = []
        for batch in plan.batches:
            # Distinct positions without sorting whole tiles: a random start and an odd stride.
            start = torch.randint(batch.tile_size, (batch.tiles, 1), generator=generator)
            stride = torch.randint(max(1, batch.tile_size // batch.k), (batch.tiles, 1), generator=generator) | 1
            index.append(((start + stride * torch.arange(batch.k)) % batch.tile_size).int())
            signs = torch.rand(batch.tiles, batch.k, generator=generator) < 0.5
            value.append(to_values(signs))
        updates.append(CompressedUpdate(plan, tuple(index), tuple(value), (True,) * len(plan)))
    return updates
