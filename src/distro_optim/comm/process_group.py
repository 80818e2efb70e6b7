"""An exchange on ``torch.distributed``: one asynchronous all-gather a step for the whole model, gloo or NCCL.

Updates travel in main memory, by gloo, also where the group has NCCL, which moves only the weights at the start: they
come from there and go there, and NCCL knows no time at which a call gives up. It ends the process after a time of its
own.

The ranks of a process group are one's own machines; their messages are decoded with the sizes checked but trusted
otherwise, as DistributedDataParallel trusts gradients. For strangers there is :mod:`distro_optim.comm.swarm`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ..compress import CompressedUpdate, TilePlan
from ..compress.flat import decode_flat, encode_flat, max_flat_size
from ..errors import ExchangeError, ProtocolError
from .exchange import DEFAULT_TIMEOUT, Exchange, check_timeout

__all__ = ["ProcessGroupExchange", "ambient_process_group"]

# Renamed in torch 2.13, where the old name warns. A torch built without distributed has neither, and trains alone.
_gather_flat: Final[Any] = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_LENGTH_SIZE: Final = 8
"""Bytes of the length in front of a message."""


class ProcessGroupExchange(Exchange):
    """All ranks of a process group.

    A message is its length and then the update in :mod:`~distro_optim.compress.flat` form, filled up to the size of
    a complete update, because a collective wants equal sizes. The collective of one step runs in the background until
    :meth:`collect` needs it: with ``DisTrO(overlap=True)`` that is after the next step's backward pass.

    Args:
        group: the process group, or None for the default one.
        timeout: how long :meth:`collect` waits.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        self._group = group
        self._timeout = check_timeout(timeout)
        self._plan: TilePlan | None = None
        self._messages: dist.ProcessGroup | None = None  # None: the group itself
        self._capacity = 0  # bytes of a message, agreed on by all ranks
        self._in_flight: deque[tuple[dist.Work, Tensor, Tensor, CompressedUpdate]] = deque()
        self._closed = False

    @property
    @override
    def num_peers(self) -> int:
        return dist.get_world_size(self._group)

    @override
    def start(self, plan: TilePlan, params: Sequence[Tensor]) -> None:
        """See :meth:`Exchange.start`. All ranks take the weights of the group's first rank, as under DDP."""
        self._require_open()
        if self._in_flight:
            raise ExchangeError("start() with an update in flight: collect() it first")
        device = _communication_device(self._group, params)
        if device.type != "cpu" and self._messages is None:
            self._messages = self._group_of_hosts()
        mine = torch.frombuffer(bytearray(plan.layout), dtype=torch.uint8)
        everybody = self._compared(mine)
        for rank, layout in enumerate(everybody):
            if not torch.equal(layout, everybody[0]):
                raise ExchangeError(
                    f"rank {rank} has other parameters than rank 0 (number, shapes, dtypes, tiling, top-k or "
                    "arithmetic differ): build the same model and optimizer on every rank"
                )
        source = dist.get_global_rank(self._group, 0) if self._group is not None else 0
        for param in params:
            data = param.detach().to(device).contiguous()
            work = dist.broadcast(data, src=source, group=self._group, async_op=True)
            self._wait(work)
            with torch.no_grad():
                param.copy_(data)
        self._plan = plan
        self._capacity = 0

    @override
    def publish(self, update: CompressedUpdate) -> None:
        """See :meth:`Exchange.publish`. The first time after :meth:`start`, waits for the ranks to compare sizes."""
        self._require_open()
        if self._plan is None:
            raise ExchangeError("start() before publish()")
        payload = encode_flat(update)
        capacity = _LENGTH_SIZE + max_flat_size(self._plan, quantized=update.quantized)
        if capacity != self._capacity:
            self._agree_on_capacity(capacity)
        message = bytearray(len(payload).to_bytes(_LENGTH_SIZE, "little") + payload)
        message.extend(bytes(capacity - len(message)))
        mine = torch.frombuffer(message, dtype=torch.uint8)
        work, everybody = self._all_gather(mine)
        self._in_flight.append((work, mine, everybody, update))
        self.bytes_sent += capacity

    def _agree_on_capacity(self, capacity: int) -> None:
        """A collective of messages of different sizes would break down with an error that says nothing."""
        sizes = self._compared(torch.tensor([capacity], device="cpu")).flatten().tolist()
        if len(set(sizes)) > 1:
            raise ExchangeError(
                f"the ranks send messages of {sizes} bytes: give quantize_1bit the same value on every rank"
            )
        self._capacity = capacity

    @override
    def collect(self) -> list[CompressedUpdate]:
        self._require_open()
        if not self._in_flight or self._plan is None:
            raise ExchangeError("nothing is in flight: publish() before collect()")
        work, mine, everybody, own = self._in_flight.popleft()
        self._wait(work)
        rank = dist.get_rank(self._group)
        messages = everybody.numpy()
        self.bytes_received += mine.numel() * (self.num_peers - 1)
        updates = []
        for peer, message in enumerate(messages):
            if peer == rank:
                updates.append(own)
                continue
            length = int.from_bytes(message[:_LENGTH_SIZE].tobytes(), "little")
            try:
                if length > len(message) - _LENGTH_SIZE:
                    raise ProtocolError(f"a length of {length} in a message of {len(message)} bytes")
                data = memoryview(message)[_LENGTH_SIZE : _LENGTH_SIZE + length]
                updates.append(decode_flat(data, self._plan, check=False))
            except ProtocolError as error:
                raise ExchangeError(f"rank {peer} sent no update: {error}") from error
        return updates

    def _group_of_hosts(self) -> dist.ProcessGroup:
        """The same ranks, over gloo."""
        ranks = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        try:
            made: dist.ProcessGroup = dist.new_group(
                ranks, timeout=self._timeout, backend="gloo", use_local_synchronization=True
            )
        except RuntimeError as error:
            raise ExchangeError(
                f"the ranks do not reach each other over gloo, which carries updates beside NCCL: {error}; set "
                "GLOO_SOCKET_IFNAME to the network interface between them"
            ) from error
        return made

    def _all_gather(self, mine: Tensor) -> tuple[dist.Work, Tensor]:
        """Starts to gather everybody's ``(n,)`` as ``(ranks, n)``."""
        everybody = mine.new_empty(self.num_peers, mine.numel())
        work = _gather_flat(everybody.view(-1), mine, group=self._messages or self._group, async_op=True)
        return work, everybody

    def _compared(self, mine: Tensor) -> Tensor:
        """Gathers everybody's ``(n,)`` as ``(ranks, n)`` and waits for it."""
        work, everybody = self._all_gather(mine)
        self._wait(work)
        return everybody

    def _wait(self, work: dist.Work | None) -> None:
        if work is None:
            raise ExchangeError("this process is not a member of the process group of its optimizer")
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            raise ExchangeError(f"the ranks did not answer within {self._timeout}, or one is gone: {error}") from error

    @override
    def close(self) -> None:
        # A collective that has begun runs to its end without us, so the others get our last update.
        self._in_flight.clear()
        self._closed = True
        self._messages = None

    def _require_open(self) -> None:
        if self._closed:
            raise ExchangeError("the exchange is closed")
        if not dist.is_initialized():
            raise ExchangeError("torch.distributed is not initialized, or was shut down: init_process_group() first")


def ambient_process_group(
    group: dist.ProcessGroup | None, *, initialize: bool, params: Sequence[Tensor] = ()
) -> tuple[dist.ProcessGroup | None, int]:
    """The process group a script runs in, and its size: ``group``, or the default one, or this process alone (None, 1).

    Args:
        initialize: under torchrun in a script without ``init_process_group``, call it: NCCL for parameters on a GPU,
            else gloo.
    """
    if not dist.is_available():
        return None, 1
    if group is not None:
        return group, dist.get_world_size(group)
    if dist.is_initialized():
        return None, dist.get_world_size()
    size = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    if size > 1 and initialize:
        dist.init_process_group("nccl" if any(p.device.type == "cuda" for p in params) else "gloo")
    return None, size


def _communication_device(group: dist.ProcessGroup | None, params: Sequence[Tensor]) -> torch.device:
    """NCCL moves what lies on its GPU; gloo what lies on the CPU."""
    if dist.get_backend(group) == "nccl":
        for param in params:
            if param.device.type == "cuda":
                return param.device
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
