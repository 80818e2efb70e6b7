"""Small models, and ways to train them, that tests of the optimizer share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distro_optim import DisTrO


class EveryShape(nn.Module):
    """A 0-D, 1-D, 2-D, prime and convolution parameter, an empty one, and one that the forward pass never uses."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))
        self.conv = nn.Conv2d(1, 5, 3, dtype=dtype)
        self.prime = nn.Linear(5, 127, dtype=dtype)
        self.head = nn.Linear(127, 3, bias=False, dtype=dtype)
        self.nothing = nn.Parameter(torch.empty(0, 4, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(6, dtype=dtype))

    @override
    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.conv(x)).mean(dim=(2, 3))
        y: Tensor = self.scale * self.head(torch.tanh(self.prime(features))) + self.nothing.sum()
        return y

    def loss(self, step: int) -> Tensor:
        """On the batch of ``step``, the same one every time."""
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 1, 6, 6, generator=generator).to(self.scale.dtype)
        y = torch.randint(3, (4,), generator=generator)
        return F.cross_entropy(self(x).float(), y)


class TinyGPT(nn.Module):
    """One block of a causal transformer with tied embeddings."""

    def __init__(self, vocabulary: int = 31, width: int = 32, context: int = 16) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        self.head.weight = self.token.weight

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position[: tokens.shape[1]]
        q, k, v = self.qkv(self.norm1(x)).unsqueeze(1).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.head(self.norm3(x))
        return logits


class TinyResNet(nn.Module):
    """Convolutions with batch norm and a shortcut."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, classes)

    @override
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)))
        y = self.norm3(self.conv2(F.relu(self.norm2(self.conv1(x)))))
        logits: Tensor = self.head(F.relu(x + y).mean(dim=(2, 3)))
        return logits


def closure_step(model: EveryShape, optimizer: DisTrO, step: int) -> None:
    """A step as Lightning takes it."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        return loss.item()

    optimizer.step(closure)


def plain_step(model: EveryShape, optimizer: DisTrO, step: int) -> None:
    """A step as a script takes it."""
    optimizer.zero_grad()
    model.loss(step).backward()
    optimizer.step()


Step = Callable[[EveryShape, DisTrO, int], None]
STEPS: dict[str, Step] = {"closure": closure_step, "plain": plain_step}


def set_gradients(params: Iterable[Tensor], seed: int, scale: float = 1.0) -> None:
    """Random gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def copies(params: Iterable[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: -0 is not 0 here, and a NaN is itself."""
    return _raw(a) == _raw(b)


def _raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def all_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
