"""The weights of a step where they lie still, so that other threads may read them while this one trains.

All weights are hashed in every round. That takes a second per gigabyte or two, for which nobody need wait: the weights
of a step stay as they are from the moment when what was due is applied to the next round's training::

    apply · ─ hash ─ · lookahead · forward, backward · lookahead off · decay · ..  next apply · lookahead
            in the parameters     in state["weight"], where the optimizer keeps them aside ──────┤

The thread that trains says where they lie (:meth:`StillWeights.lay_down`), that they move (:meth:`StillWeights.moving`)
and that they are about to change (:meth:`StillWeights.take_up`). Others read in pieces of a few megabytes, between
which they make way. So the one that trains waits for a piece at most when weights move, and when they change, for
readers that it wants to finish; what anybody reads is of one step, or it is told that it came too late.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, uint8

__all__ = ["PIECE_BYTES", "StillWeights", "WeightsGone", "on_the_host", "ready_events"]

PIECE_BYTES: Final = 4 << 20
"""Read at a time. One to two milliseconds of hashing: as long as the thread that trains may have to wait."""


class WeightsGone(Exception):
    """The weights of the step do not lie still any more. An answer rather than an error: callers deal with it."""


class StillWeights:
    """See the module. Methods of the first group belong to the thread that trains, the others to any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._step: int | None = None
        self._tensors: Mapping[str, Tensor] = {}
        self._ready: Mapping[torch.device, torch.cuda.Event] = {}
        self._set_aside = False
        self._moving = False
        self._readers = 0

    # -- the thread that trains ----------------------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """Of the weights that lie still; None if none do."""
        return self._step

    @property
    def set_aside(self) -> bool:
        """Whether they lie where they were moved to, and not in the parameters."""
        return self._set_aside

    def lay_down(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """From now on the weights of ``step`` are in ``tensors``, by name, until :meth:`take_up`."""
        self.take_up()
        with self._changed:
            self._step, self._tensors, self._set_aside = step, dict(tensors), False
            self._ready = ready_events(self._tensors.values())

    @contextmanager
    def moving(self, to: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
        """Within this block the weights are copied elsewhere, and nobody reads; afterwards they lie in ``to()``.

        If it is left by an exception, they lie nowhere.
        """
        self._stop_readers()
        try:
            yield
            tensors = dict(to())
        except BaseException:
            tensors = {}
            raise
        finally:
            with self._changed:
                self._moving = False
                self._tensors, self._set_aside = tensors, True
                self._ready = ready_events(tensors.values())
                if not tensors:
                    self._step = None
                self._changed.notify_all()

    def take_up(self) -> None:
        """The weights are about to change. Waits until the piece that is being read is read; then nobody reads."""
        self._stop_readers()
        with self._changed:
            self._step, self._tensors, self._ready, self._moving = None, {}, {}, False
            self._changed.notify_all()

    def _stop_readers(self) -> None:
        with self._changed:
            self._moving = True
            try:
                while self._readers:
                    self._changed.wait()
            except BaseException:
                self._moving = False
                self._changed.notify_all()
                raise

    # -- any thread ----------------------------------------------------------------------------------------------------

    def read(self, step: int, name: str, take: Callable[[memoryview], object]) -> None:
        """Gives the bytes of a tensor at ``step`` to ``take``, from first to last, in pieces.

        Raises:
            WeightsGone: those of ``step`` do not lie still any more, or not yet, or there is no such tensor.
        """
        start, stop = 0, 1
        while start < stop:
            with self._reading(step, name) as (tensor, ready):
                elements = max(1, PIECE_BYTES // tensor.element_size())
                # A copy of a tensor with gaps, or in another order, is made as a whole, for all of its pieces.
                stop = tensor.numel()
                piece = stop if not tensor.is_contiguous() else elements
                if stop:
                    take(_bytes_of(tensor, start, min(stop, start + piece), ready))
                start += piece

    @contextmanager
    def _reading(self, step: int, name: str) -> Iterator[tuple[Tensor, torch.cuda.Event | None]]:
        with self._changed:
            while self._moving and self._step == step:
                self._changed.wait()
            if self._step != step or name not in self._tensors:
                raise WeightsGone(f"the weights of step {step} do not lie still")
            tensor = self._tensors[name]
            self._readers += 1
        try:
            yield tensor, self._ready.get(tensor.device)
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()


def ready_events(tensors: Iterable[Tensor]) -> dict[torch.device, torch.cuda.Event]:
    """For each CUDA device, the moment up to which its stream must have come before the tensors may be read."""
    events = {}
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        events[device] = event
    return events


def _bytes_of(tensor: Tensor, start: int, stop: int, ready: torch.cuda.Event | None) -> memoryview:
    """Bytes of the elements from ``start`` to ``stop``; where possible those of the tensor itself."""
    with _aside(tensor, ready):
        return _host_bytes(tensor, start, stop)


def on_the_host(tensor: Tensor, ready: Mapping[torch.device, torch.cuda.Event]) -> Tensor:
    """The tensor, or a copy in main memory. For any thread.

    Args:
        tensor: lies still.
        ready: see :func:`ready_events`.
    """
    with _aside(tensor, ready.get(tensor.device)):
        return tensor.detach().cpu()


@contextmanager
def _aside(tensor: Tensor, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Copies are made on a stream of their own: on that of the training, one would wait for all kernels before it."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(tensor.device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield


def _host_bytes(tensor: Tensor, start: int, stop: int) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)[start:stop].cpu()
    view: memoryview = flat.view(uint8).numpy().data
    return view
