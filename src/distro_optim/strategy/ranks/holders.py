"""Who has the tensors of a model: this process all of them, or several processes a shard of each.

A run wants whole tensors: it hashes, saves, sends and loads them. The processes that hold a model together
(:class:`ShardHolders`) put one tensor together at a time, on the devices of all of them, for as long as it is looked
at. The leader alone keeps whole models, in main memory, where one is copied, downloaded or read from disk; the others
have :func:`stand_ins` in their place, which have shapes and no memory. All of them call the same methods in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...errors import RunError
from ...optim.sharding import is_sharded, shard_of
from ..rounds.weights import tensor_digest
from .local_ranks import LocalRanks

__all__ = ["Holders", "ShardHolders", "reshard", "stand_ins", "whole_of"]

T = TypeVar("T")


def stand_ins(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and types, without memory."""
    return {name: _stand_in(value) for name, value in values.items()}


def _stand_in(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


class Holders:
    """This process has all tensors, whole.

    Attributes:
        several: the tensors are shards.
        keeps: this process has the copies of whole models.
    """

    several = False
    keeps = True

    def decide(self, ask: Callable[[], T]) -> T:
        """What ``ask`` returns or raises where the decision lies: for what may differ between processes."""
        return ask()

    def all_want(self, wants: bool) -> bool:
        """Whether all want something, at the end of a run; False also where one of them is gone."""
        return wants

    def read(self, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Whole values by name, as ``ask`` gets them from disk."""
        return ask()

    def spread(self, value: Tensor) -> Tensor:
        """A whole value, as everybody needs it for a moment."""
        return value

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the whole tensor, contiguous, in main memory."""
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Gives ``tensor`` the whole value; of the same shape."""
        tensor.copy_(value)

    def digests(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        """:func:`.tensor_digest` of each of the model's tensors."""
        return [tensor_digest(name, tensor) for name, tensor in tensors.items()]

    def digests_of_values(self, values: Mapping[str, Tensor]) -> list[bytes]:
        """The same of whole values: of :meth:`copy`, or of :meth:`read`."""
        return [tensor_digest(name, value) for name, value in values.items()]

    def clip(self, params: Iterable[Tensor], max_norm: float) -> None:
        """Scales the gradients down to a Euclidean norm of all of them together."""
        torch.nn.utils.clip_grad_norm_(params, max_norm)

    def settle(self, model: nn.Module) -> None:
        """The weights of ``model`` are about to be read or changed where they lie."""


class ShardHolders(Holders):
    """These processes have a shard of each tensor, and what is no DTensor all alike. See the module.

    Args:
        ranks: the processes.
    """

    several = True

    def __init__(self, ranks: LocalRanks) -> None:
        self._ranks = ranks
        self.keeps = ranks.leads
        ranks.hold_together = True

    @override
    def decide(self, ask: Callable[[], T]) -> T:
        return self._ranks.share(ask if self._ranks.leads else None)

    @override
    def all_want(self, wants: bool) -> bool:
        return self._ranks.all_want(wants)

    @override
    def read(self, ask: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        got: list[dict[str, Tensor]] = []

        def look() -> dict[str, Tensor]:
            got.append(ask())
            return stand_ins(got[0])

        like = self.decide(look)
        return got[0] if got else like

    @override
    def spread(self, value: Tensor) -> Tensor:
        if self._ranks.leads:
            whole = value.detach().to("cpu").contiguous()
        else:
            whole = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        self._ranks.send(whole)
        return whole

    @override
    def copy(self, tensor: Tensor) -> Tensor:
        whole = whole_of(tensor)
        return super().copy(whole) if self._ranks.leads else _stand_in(whole)

    @override
    @torch.no_grad()
    def fill(self, tensor: Tensor, value: Tensor) -> None:
        whole = self.spread(value)
        if is_sharded(tensor):
            here: Any = tensor
            here.to_local().copy_(whole[tuple(slice(*span) for span in shard_of(tensor))])
        else:
            tensor.copy_(whole)

    @override
    def digests(self, tensors: Mapping[str, Tensor]) -> list[bytes]:
        # Everybody hashes one of as many tensors as there are processes, all at the same time: one thread of each
        # reads a gigabyte or two in a second.
        mine: dict[str, bytes] = {}
        for names in _runs(list(tensors), self._ranks.size):
            own: Tensor | None = None
            for place, name in enumerate(names):
                whole = whole_of(tensors[name])
                if place == self._ranks.rank:
                    own = whole.detach().cpu()
                del whole
            if own is not None:
                name = names[self._ranks.rank]
                mine[name] = tensor_digest(name, own)
        found = {name: digest for part in self._ranks.collect(mine) for name, digest in part.items()}
        if len(found) < len(tensors):
            raise RunError("the processes of this peer have other models: build the same one in all of them")
        return [found[name] for name in tensors]

    @override
    def digests_of_values(self, values: Mapping[str, Tensor]) -> list[bytes]:
        return self.decide(lambda: Holders.digests_of_values(self, values))

    @override
    @torch.no_grad()
    def clip(self, params: Iterable[Tensor], max_norm: float) -> None:
        # As torch.nn.utils.clip_grad_norm_, of whole gradients, one after the other: so that the norm has the bits
        # that it has unsharded, whatever meshes they lie on.
        grads: list[Any] = [param.grad for param in params if param.grad is not None]
        if not grads:
            return
        norms = [torch.linalg.vector_norm(whole_of(grad)) for grad in grads]
        total = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for grad in grads:
            here = grad.to_local() if is_sharded(grad) else grad
            here.mul_(factor.to(here.device))

    @override
    def settle(self, model: nn.Module) -> None:
        reshard(model)


def reshard(model: nn.Module) -> None:
    """Leaves no whole weights of FSDP2's behind.

    After a forward pass without a backward one it keeps those of its root, and would go on with them whatever becomes
    of the shards.
    """
    root = getattr(model, "root", None)  # CausalLM calls it, and has its parts
    for module in (*model.modules(), *([root] if isinstance(root, nn.Module) else [])):
        if (free := getattr(module, "reshard", None)) is not None and _is_fsdp(module):
            free()


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


@torch.no_grad()
def whole_of(tensor: Any) -> Tensor:
    """The whole of a tensor, on its device. All processes that hold it must call."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def _runs(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
