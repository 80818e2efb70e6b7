"""Single tensors of a model that is being trained: what a peer gives of its weights while a round goes on. No I/O.

A peer some of whose tensors are wrong asks those that are right for the hashes of all tensors at the start of a step,
and then for the tensors that differ. What makes the hashes right is their root, which is known from elsewhere; what
makes a tensor right is its hash. So nobody can give wrong ones, and whoever tries is asked no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..errors import ExchangeError, ProtocolError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DIGEST_SIZE",
    "MAX_WRONG_SHARE",
    "FetchedTensors",
    "LiveWeights",
    "TensorSource",
    "WantedTensors",
    "fetch_differing",
]

DIGEST_SIZE: Final = 32
"""Bytes of a tensor's hash."""

MAX_WRONG_SHARE: Final = 0.5
"""Of the tensors of a step, as many are asked for and given. Where more are wrong, more has happened to them than a
flipped bit, and the model is loaded as a whole. Chosen arbitrarily."""


class LiveWeights(ABC):
    """What a peer has to give. For any thread; nothing of it is a promise, since the training goes on."""

    @abstractmethod
    def digests(self, step: int) -> Sequence[bytes] | None:
        """The hashes of all tensors at the start of ``step``, 32 bytes each; None if they are not at hand."""

    @abstractmethod
    def tensor(self, step: int, name: str) -> torch.Tensor | None:
        """A copy on the CPU of a tensor as it was at the start of ``step``; None if that has passed."""


@dataclass(frozen=True, kw_only=True)
class WantedTensors:
    """What a peer asks for.

    Attributes:
        step: at whose start the weights are wanted.
        root: over the hashes of all tensors, as they should be.
        names: of all tensors, in the order of the hashes.
        digests: our own, in this order.
        max_bytes: bound on the message with a tensor, by its name.
        max_wrong: tensors that may differ at most.
        digest_of: hashes a tensor.
        root_of: makes a root of hashes.
    """

    step: int
    root: bytes
    names: tuple[str, ...]
    digests: tuple[bytes, ...]
    max_bytes: Mapping[str, int]
    max_wrong: int
    digest_of: Callable[[str, torch.Tensor], bytes]
    root_of: Callable[[Sequence[bytes]], bytes]


@dataclass(frozen=True, kw_only=True)
class FetchedTensors:
    """What came.

    Attributes:
        digests: of all tensors, as they should be.
        tensors: those that differed, by name, with these hashes.
        liars: public keys of peers that gave hashes of another root, or a tensor of another hash.
    """

    digests: tuple[bytes, ...]
    tensors: Mapping[str, torch.Tensor]
    liars: tuple[bytes, ...] = field(default=())


class TensorSource(ABC):
    """Asks one peer at a time. All methods belong to one event loop."""

    @abstractmethod
    async def ask_digests(self, peer: bytes, step: int, count: int) -> list[bytes]:
        """The peer's hashes of all tensors at ``step``.

        Raises:
            ExchangeError: it cannot be reached, or has them no more.
            ProtocolError: what it sent is not ``count`` hashes.
        """

    @abstractmethod
    async def ask_tensor(self, peer: bytes, wanted: WantedTensors, name: str) -> tuple[torch.Tensor, bytes]:
        """The peer's tensor at ``wanted.step``, and its hash.

        Raises:
            ExchangeError: it cannot be reached, or has it no more.
            ProtocolError: what it sent is not a tensor, or too large.
        """


async def fetch_differing(source: TensorSource, providers: Iterable[bytes], wanted: WantedTensors) -> FetchedTensors:
    """The tensors in which ours differ from those of the root, from any of ``providers``, best first.

    Raises:
        ExchangeError: nobody gave them, or more differ than may; the message holds the last reason.
    """
    peers = list(dict.fromkeys(providers))
    liars: list[bytes] = []
    reason: Exception | str = "there is no peer to ask"
    digests: list[bytes] | None = None
    for peer in list(peers):
        try:
            said = await source.ask_digests(peer, wanted.step, len(wanted.names))
        except (ExchangeError, ProtocolError) as error:
            reason = error
            continue
        if wanted.root_of(said) == wanted.root:
            digests = said
            break
        reason = f"{peer.hex()[:10]} gave hashes of another root"
        liars.append(peer)
        peers.remove(peer)
    if digests is None:
        raise ExchangeError(f"no peer gave the hashes of step {wanted.step}: {reason}")
    differing = [
        (name, right) for name, ours, right in zip(wanted.names, wanted.digests, digests, strict=True) if ours != right
    ]
    if len(differing) > wanted.max_wrong:
        raise ExchangeError(f"{len(differing)} of {len(wanted.names)} tensors differ: too many to fetch one by one")
    tensors: dict[str, torch.Tensor] = {}
    for name, right in differing:
        for peer in list(peers):
            try:
                tensor, digest = await source.ask_tensor(peer, wanted, name)
            except (ExchangeError, ProtocolError) as error:
                reason = error
                continue
            if digest == right:
                tensors[name] = tensor
                break
            reason = f"{peer.hex()[:10]} gave another tensor than the one with this hash"
            liars.append(peer)
            peers.remove(peer)
        else:
            raise ExchangeError(f"no peer gave {name} as it was at step {wanted.step}: {reason}")
    return FetchedTensors(digests=tuple(digests), tensors=tensors, liars=tuple(liars))
