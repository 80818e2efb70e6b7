"""Single tensors of the model in training, from peer to peer: both sides of ``distro-optim-weights/1``.

::

    requester  -> DigestsRequest(step) | TensorRequest(step, name)     postcard, then the end of the stream
    responder  <- Ok(BlobTicket) | Err(SharingError variant)           as model-sharing/0 has it

The ticket leads to the hashes of all tensors, one after the other, or to a ``ModelParameter``. Psyche's clients do not
speak this; what they speak is in :mod:`.messages`.

What it may cost a peer is bounded: of a step, at most half of the tensors are given, each copied once however many ask;
and each peer may ask about few steps, and so often.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import override

from ....errors import ExchangeError, ProtocolError
from ... import postcard
from ...live_weights import DIGEST_SIZE, MAX_WRONG_SHARE, LiveWeights, TensorSource, WantedTensors
from ...postcard import U32
from ...swarm import Swarm
from ...tickets import BlobTicket
from ..connection import Connection
from ..endpoint import Node
from .asking import AskBudget
from .messages import (
    ParametersNotInitialized,
    ParameterUnknown,
    SerializationError,
    TensorName,
)
from .requests import answer_request, send_request
from .transfer import parameter_blob, parameter_tensor

if TYPE_CHECKING:
    import torch

__all__ = ["ALPN", "MAX_STEPS_PER_PEER", "DigestsRequest", "LiveSharing", "TensorRequest", "decode_live_request"]

_log = logging.getLogger(__name__)

ALPN: Final = b"distro-optim-weights/1"
"""The number changes with what is hashed, and how."""

MAX_STEPS_PER_PEER: Final = 16
"""About which one peer may ask, as long as we are in the run: a few repairs in a few epochs. Chosen arbitrarily."""

MAX_PEERS: Final = 1024
"""Of which we remember what they asked; an epoch has 256 at most."""

_TAG_PREFIX: Final = "weights-"
"""Of the tags of what is given."""


@dataclass(frozen=True)
class DigestsRequest:
    """Asks for the hashes of all tensors at the start of a step."""

    step: U32


@dataclass(frozen=True)
class TensorRequest:
    """Asks for one tensor as it was at the start of a step."""

    step: U32
    name: TensorName


LiveRequest = DigestsRequest | TensorRequest


def encode_live_request(request: LiveRequest) -> bytes:
    """See :func:`decode_live_request`."""
    return postcard.encode(request, LiveRequest)


def decode_live_request(data: bytes) -> LiveRequest:
    """Raises ProtocolError."""
    request: LiveRequest = postcard.decode(LiveRequest, data)
    return request


class LiveSharing(TensorSource):
    """Gives tensors of the own model in training, and asks peers for theirs.

    Args:
        node: connects, and serves :data:`ALPN` from now on.
        swarm: publishes what is given, and fetches what is asked for.
    """

    def __init__(self, node: Node, swarm: Swarm) -> None:
        self._node = node
        self._swarm = swarm
        self._live: LiveWeights | None = None
        self._step = -1
        # Of this step, by name; None for the hashes.
        self._tickets: dict[str | None, asyncio.Task[BlobTicket]] = {}
        self._asked: dict[bytes, set[int]] = {}
        self._budget = AskBudget()
        node.accept(ALPN, self._serve)

    def offer(self, live: LiveWeights | None) -> None:
        """Gives of these from now on; None gives nothing."""
        self._live = live
        self._begin(-1)

    def _begin(self, step: int) -> None:
        self._step = step
        self._tickets.clear()
        self._swarm.forget(lambda tag: tag.startswith(_TAG_PREFIX))

    # -- asking --------------------------------------------------------------------------------------------------------

    @override
    async def ask_digests(self, peer: bytes, step: int, count: int) -> list[bytes]:
        ticket = await self._request(peer, DigestsRequest(step))
        data = await self._swarm.fetch(ticket, max_size=count * DIGEST_SIZE)
        if len(data) != count * DIGEST_SIZE:
            raise ProtocolError(f"{len(data)} bytes came in place of {count} hashes")
        return [bytes(data[at : at + DIGEST_SIZE]) for at in range(0, len(data), DIGEST_SIZE)]

    @override
    async def ask_tensor(self, peer: bytes, wanted: WantedTensors, name: str) -> tuple[torch.Tensor, bytes]:
        ticket = await self._request(peer, TensorRequest(wanted.step, name))
        data = await self._swarm.fetch(ticket, max_size=wanted.max_bytes[name])

        def read() -> tuple[torch.Tensor, bytes]:
            tensor = parameter_tensor(name, data)
            return tensor, wanted.digest_of(name, tensor)

        return await asyncio.to_thread(read)

    async def _request(self, peer: bytes, request: LiveRequest) -> BlobTicket:
        return await send_request(self._node, peer, ALPN, encode_live_request(request), about="the weights")

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _serve(self, connection: Connection) -> None:
        peer = connection.remote_id
        await answer_request(connection, self._budget, lambda data: self._answer(peer, decode_live_request(data)))

    async def _answer(self, peer: bytes, request: LiveRequest) -> Any:
        live = self._live
        digests = live.digests(request.step) if live is not None else None
        if live is None or digests is None or not self._may_ask(peer, request.step):
            return ParametersNotInitialized()
        self._budget.resize(len(digests))
        if request.step != self._step:
            self._begin(request.step)
        key = request.name if isinstance(request, TensorRequest) else None
        task = self._tickets.get(key)
        if task is None:
            # Tickets of the hashes and of half of the tensors.
            if key is not None and len(self._tickets.keys() - {None}) >= MAX_WRONG_SHARE * len(digests):
                return ParameterUnknown("too many tensors of one step")
            make = self._give_tensor(live, key) if key is not None else self._give_digests(b"".join(digests))
            task = self._tickets[key] = asyncio.get_running_loop().create_task(make)
        try:
            return await asyncio.shield(task)
        except ExchangeError as error:
            _log.info("%s of step %d cannot be given: %s", key, request.step, error)
            return ParametersNotInitialized()
        except Exception as error:
            _log.exception("a tensor cannot be given")
            return SerializationError(type(error).__name__)

    def _may_ask(self, peer: bytes, step: int) -> bool:
        if peer not in self._asked and len(self._asked) >= MAX_PEERS:
            return False
        steps = self._asked.setdefault(peer, set())
        if step not in steps and len(steps) >= MAX_STEPS_PER_PEER:
            return False
        steps.add(step)
        return True

    async def _give_digests(self, digests: bytes) -> BlobTicket:
        return await self._swarm.publish(digests, f"{_TAG_PREFIX}digests")

    async def _give_tensor(self, live: LiveWeights, name: str) -> BlobTicket:
        step, number = self._step, len(self._tickets)

        def copy() -> bytes:
            tensor = live.tensor(step, name)
            if tensor is None:
                raise ExchangeError("the training has gone on, or there is no such tensor")
            return parameter_blob(name, tensor)

        return await self._swarm.publish(await asyncio.to_thread(copy), f"{_TAG_PREFIX}{step}-{number}")
