"""Joiners get the model from peers: both sides of ``model-sharing/0``.

The responder answers each request with a ticket for a blob; the requester fetches the blob, which proves itself by
its hash, and reads the parameter out of its archive without running anything. One connection per request, as
Psyche's peers do it (``shared/network/src/p2p_model_sharing.rs``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from ....callbacks import SafeCallback
from ....errors import ExchangeError, ProtocolError
from ...model_exchange import Check, Patience, SharedModel
from ...tickets import BlobTicket
from ..connection import Connection
from ..endpoint import Node
from .asking import AskBudget
from .messages import (
    ALPN,
    MAX_CONFIG_BLOB,
    ConfigRequest,
    ModelConfig,
    ModelConfigNotInitialized,
    ModelParameter,
    ParameterRequest,
    ParametersNotInitialized,
    ParameterUnknown,
    SerializationError,
    decode_blob,
    decode_request,
    encode_blob,
    encode_request,
)
from .peers import SharingPeers
from .requests import answer_request, send_request
from .search import find_sharers

if TYPE_CHECKING:
    import torch

__all__ = ["TAG_PREFIX", "Fetch", "ModelSharing", "Publish", "download_model", "parameter_blob", "parameter_tensor"]

_log = logging.getLogger(__name__)

Publish = Callable[[bytes, str], Awaitable[BlobTicket]]
"""Puts bytes in the own blob store under a tag, and returns a ticket for them."""
Fetch = Callable[[BlobTicket, int], Awaitable[bytes]]
"""Gets the bytes of a ticket, verified, at most so many; raises ExchangeError or ProtocolError."""

_CONCURRENT: Final = 8
"""``max_concurrent_parameter_requests`` (``shared/client/src/cli.rs``)."""

_ATTEMPTS: Final = 500
"""Attempts for one part, all peers together, before giving up (``shared/client/src/state/init.rs``)."""

# Wait after an error (same file), so that peers that refuse are not hammered.
_ERROR_SECONDS: Final = 0.1
TAG_PREFIX: Final = "model-"
"""Of the tags of all parts of a model in the store that publishes them."""

_CONFIG_TAG: Final = TAG_PREFIX + "config"
_MAX_TAG_BYTES: Final = 80
"""The stores' bound on a tag (:mod:`.blobs.store`)."""


class ModelSharing:
    """Offers the own model to peers, and asks peers for parts of theirs.

    Args:
        node: connects, and serves ``model-sharing/0`` from now on.
        publish: see :data:`Publish`.
    """

    def __init__(self, node: Node, publish: Publish) -> None:
        self._node = node
        self._publish = publish
        self._model: SharedModel | None = None
        self._budget = AskBudget()
        # Per part, so that many who ask at once cause one archive; kept while this model is offered.
        self._tickets: dict[str | None, asyncio.Task[BlobTicket]] = {}
        node.accept(ALPN, self._serve)

    def offer(self, model: SharedModel) -> None:
        """Shares ``model`` from now on, in place of what was shared before.

        Archives are made when first asked for; the tensors must not change until :meth:`withdraw`. Untagging the
        blobs of a former model, ``model-*``, is up to the owner of the store.
        """
        self._model = model
        self._budget.resize(len(model.parameters))
        self._tickets.clear()

    def withdraw(self) -> None:
        """Shares nothing any more; requests are answered with ``ParametersNotInitialized``."""
        self._model = None
        self._tickets.clear()

    async def request_config(self, peer: bytes) -> BlobTicket:
        """Asks ``peer`` for its configuration.

        Raises:
            NotSharedError: it has none to share.
            ExchangeError: it cannot be reached, or does not answer in 10 seconds.
            ProtocolError: its answer is malformed.
        """
        return await self._request(peer, ConfigRequest())

    async def request_parameter(self, peer: bytes, name: str) -> BlobTicket:
        """Asks ``peer`` for one parameter; raises as :meth:`request_config`."""
        return await self._request(peer, ParameterRequest(name))

    async def _request(self, peer: bytes, request: ConfigRequest | ParameterRequest) -> BlobTicket:
        return await send_request(self._node, peer, ALPN, encode_request(request), about="the model")

    async def _serve(self, connection: Connection) -> None:
        await answer_request(connection, self._budget, lambda data: self._answer(decode_request(data)))

    async def _answer(self, request: ConfigRequest | ParameterRequest) -> Any:
        model = self._model
        if isinstance(request, ConfigRequest):
            if model is None or not model.parameters:
                return ModelConfigNotInitialized()
            key = None
        else:
            if model is None:
                return ParametersNotInitialized()
            if request.name not in model.parameters:
                return ParameterUnknown(request.name)
            key = request.name
        task = self._tickets.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._make(model, key))
            self._tickets[key] = task
        try:
            return await asyncio.shield(task)
        except Exception as error:
            if self._tickets.get(key) is task:
                del self._tickets[key]  # so that the next request tries again
            _log.exception("a part of the model cannot be shared")
            return SerializationError(type(error).__name__)

    async def _make(self, model: SharedModel, name: str | None) -> BlobTicket:
        if name is None:
            content = encode_blob(ModelConfig(model.config, model.tokenizer, list(model.parameters)))
            return await self._publish(content, _CONFIG_TAG)
        # Copying hundreds of megabytes would stop the loop: gossip would miss its timers.
        content = await asyncio.to_thread(parameter_blob, name, model.parameters[name])
        return await self._publish(content, _parameter_tag(name))


def _parameter_tag(name: str) -> str:
    tag = TAG_PREFIX + name
    if len(tag.encode()) <= _MAX_TAG_BYTES:
        return tag
    return TAG_PREFIX + hashlib.sha256(name.encode()).hexdigest()


def parameter_blob(name: str, tensor: torch.Tensor) -> bytes:
    """One parameter as it travels."""
    from .torchscript import write_tensor

    return encode_blob(ModelParameter(name.encode(), write_tensor(tensor)))


def parameter_tensor(name: str, blob: bytes) -> torch.Tensor:
    """See :func:`parameter_blob`; raises ProtocolError."""
    from .torchscript import read_tensor

    content = decode_blob(blob)
    if not isinstance(content, ModelParameter) or content.name != name.encode():
        raise ProtocolError(f"something else came in place of the parameter {name!r}")
    return read_tensor(content.value)


def _config(blob: bytes) -> ModelConfig:
    content = decode_blob(blob)
    if not isinstance(content, ModelConfig):
        raise ProtocolError("a parameter came in place of the configuration")
    if len(set(content.parameter_names)) != len(content.parameter_names):
        raise ProtocolError("a parameter is named twice in the configuration")
    return content


async def download_model(
    sharing: ModelSharing,
    peers: Iterable[bytes],
    fetch: Fetch,
    *,
    max_parameter_bytes: int,
    latencies: dict[bytes, float] | None = None,
    concurrent: int = _CONCURRENT,
    check: Check | None = None,
    progress: Callable[[int, int], None] | None = None,
    patience: Patience = Patience.ONCE,
    seconds: float = 0.0,
) -> SharedModel:
    """Gets a whole model from ``peers``: the configuration from one, the parameters from all that have the same.

    A part that one peer does not deliver is asked of another; see :class:`~.peers.SharingPeers`. Those with
    another configuration, or without any as yet, are asked only when none of the others is left.

    Args:
        sharing: asks.
        peers: endpoint ids, best first.
        fetch: see :data:`Fetch`.
        max_parameter_bytes: bound on one parameter's blob.
        latencies: round-trip seconds of peers, where known.
        concurrent: downloads at a time.
        check: see :data:`~distro_optim.comm.model_exchange.Check`; after a ProtocolError the next peer is asked.
        progress: called with parameters done and in all; what it raises is logged and stops nothing.
        patience: with peers that have nothing to share yet.
        seconds: of patience.

    Raises:
        ExchangeError: no peer is left that answers; the message holds the last reason.
    """
    one_by_one = asyncio.Lock()

    def checked(peer: bytes, blob: bytes) -> tuple[ModelConfig, int | Mapping[str, int] | None]:
        config = _config(blob)
        return config, check(peer, config.config, config.parameter_names) if check is not None else None

    async def ask(peer: bytes) -> _Described:
        blob = await fetch(await sharing.request_config(peer), MAX_CONFIG_BLOB)
        async with one_by_one:
            return _Described(blob, *await asyncio.to_thread(checked, peer, blob))

    def limit_of(name: str) -> int:
        bound = bounds.get(name) if isinstance(bounds, Mapping) else bounds
        return max_parameter_bytes if bound is None else min(max_parameter_bytes, bound)

    found = await find_sharers(ask, peers, patience=patience, seconds=seconds)
    config, bounds = found.answer.config, found.answer.bounds
    rest = SharingPeers(found.others, latencies=latencies)
    state = _Download(sharing, SharingPeers(found.peers, latencies=latencies), rest, fetch)
    slots = asyncio.Semaphore(concurrent)
    parameters: dict[str, torch.Tensor] = {}
    told = SafeCallback(progress, "progress") if progress is not None else None

    async def one(name: str) -> None:
        async with slots:
            parameters[name] = await state.part(name, limit_of(name), lambda blob: parameter_tensor(name, blob))
        if told is not None:
            told(len(parameters), len(config.parameter_names))

    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for name in config.parameter_names:
                group.create_task(one(name))
    except* (ExchangeError, ProtocolError) as errors:
        failure = errors.exceptions[0]
    if failure is not None:  # raised out here: what leaves an except* may be put into a group
        raise failure
    ordered = {name: parameters[name] for name in config.parameter_names}
    return SharedModel(config.config, config.tokenizer, ordered)


@dataclass(frozen=True)
class _Described:
    """A peer's answer to the question for its configuration; equal if the bytes are."""

    blob: bytes
    config: ModelConfig = field(compare=False)
    bounds: int | Mapping[str, int] | None = field(compare=False)


class _Download:
    """Tries peers for one part after the other, several parts at a time."""

    def __init__(self, sharing: ModelSharing, peers: SharingPeers, reserve: SharingPeers, fetch: Fetch) -> None:
        self._sharing = sharing
        self._peers = peers
        self._reserve = reserve
        self._fetch = fetch
        self._freed = asyncio.Condition()
        self._reason: Exception | None = None  # of the last failure, whatever the part

    async def part(self, name: str, limit: int, read: Callable[[bytes], Any]) -> Any:
        """A parameter, from any peer that delivers it."""
        for _ in range(_ATTEMPTS):
            peer = await self._peer()
            try:
                try:
                    ticket = await self._sharing.request_parameter(peer, name)
                finally:
                    # Free for the next question while the bytes flow.
                    await self._give_back(peer)
                began = time.monotonic()
                blob = await self._fetch(ticket, limit)
                self._peers.measured(peer, len(blob) / max(time.monotonic() - began, 1e-6))
                return await asyncio.to_thread(read, blob)
            except (ExchangeError, ProtocolError) as error:
                _log.info("%s did not deliver %s: %s", peer.hex()[:10], name, error)
                self._reason = error
                await self._failed(peer)
                await asyncio.sleep(_ERROR_SECONDS)
        raise ExchangeError(f"{name} was not delivered in {_ATTEMPTS} attempts: {self._reason}")

    async def _give_back(self, peer: bytes) -> None:
        self._peers.give_back(peer)
        async with self._freed:
            self._freed.notify_all()

    async def _failed(self, peer: bytes) -> None:
        self._peers.failed(peer)
        async with self._freed:
            self._freed.notify_all()  # those that wait may have to learn that no peer is left

    async def _peer(self) -> bytes:
        async with self._freed:
            while True:
                if self._peers.exhausted:
                    self._peers = self._reserve
                if self._peers.exhausted:
                    raise ExchangeError(f"no peer shares the model: {self._reason}") from self._reason
                peer = self._peers.take()
                if peer is not None:
                    return peer
                await self._freed.wait()
