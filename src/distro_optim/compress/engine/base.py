"""The seam between what a step means and what carries it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..extraction import OwnPart
from ..merging import Sizes
from ..plan import TilePlan
from ..update import CompressedUpdate
from .transfer import Uploads, downloaded

__all__ = ["Engine", "Intake"]


@dataclass(frozen=True)
class Intake:
    """What the first half of a step begins with. Per tensor of the plan, if nothing else is said.

    Attributes:
        grads: shaped as the tensors, contiguous, of any float type; or None: that tensor keeps its momentum and is
            absent from the update.
        momenta: contiguous, of the compute dtype; changed in place.
        in_coefficients: whether the momentum is ``(tiles, h, w)``, coefficients of whole tiles, or shaped as the
            tensor; alike for all tensors of a batch. Not together with ``own``.
        lr: per parameter group, with any unscaling of the gradients folded in.
        decay: per parameter group.
        quantize: signs are sent, not values.
        own: what was sent in the round before, which leaves the momentum first; what is sent now replaces it, in
            place. None: what is sent leaves the momentum at once.
        step: parameters and their groups' learning rates, for a peer that is alone and sends values: what leaves the
            momentum is the whole update then, so the parameters take it at once, in place.
        usable: for an engine that :attr:`~Engine.defers`: ``(tensors,)`` int32, on the device: 0 for gradients that are
            left out as if they were None, so that nobody has to wait for that.
        scale: 0-D float32, on the device: what ``lr`` has to be divided by beside; only with ``usable``.
    """

    grads: Sequence[Tensor | None]
    momenta: Sequence[Tensor]
    in_coefficients: Sequence[bool]
    lr: Sequence[float]
    decay: Sequence[float]
    quantize: bool
    own: Sequence[OwnPart] | None = None
    step: tuple[Sequence[Tensor], Sequence[float]] | None = None
    usable: Tensor | None = None
    scale: Tensor | None = None

    def settled(self) -> Intake:
        """The same without ``usable`` and ``scale``. Waits for the device, where they are."""
        if self.usable is None:
            return self
        known = [self.usable.to(torch.float32)]
        if self.scale is not None:
            known.append(self.scale.reshape(1))
        seen: list[float] = torch.cat(known).tolist()
        scale = 1.0 if self.scale is None else seen.pop()
        grads = [grad if flag else None for grad, flag in zip(self.grads, seen, strict=True)]
        return replace(self, grads=grads, lr=[rate / scale for rate in self.lr], usable=None, scale=None)


class Engine(ABC):
    """Carries out the steps of one plan, on the devices of its tensors. Belongs to one thread.

    Engines of one arithmetic differ in what they pick where rounding decides, since what a peer sends is its own, and
    in speed. In ``arithmetic="exact"`` they agree in every bit of the weights. ``tests/engines`` holds all of them to
    the same promises.

    Updates come and go in two forms: on the devices of the plan, as :meth:`extract` makes them and :meth:`merge` takes
    them, or in main memory, as they travel. Only :meth:`upload` and :meth:`download` know both: threads other than the
    one that trains never touch a device.

    Args:
        plan: of the tensors; an attribute, too.
    """

    def __init__(self, plan: TilePlan) -> None:
        self.plan = plan
        self._uploads: dict[torch.device, Uploads] = {}

    @property
    @abstractmethod
    def needs_whole_updates(self) -> bool:
        """Whether a step depends on all of an update, so that weights cannot take it tile by tile as it is made."""

    @abstractmethod
    def extract(self, intake: Intake) -> CompressedUpdate:
        """``momentum = decay * momentum + lr * grad``, and the largest coefficients of it.

        Tensors that are zero all over are absent where signs are sent: a sign cannot say 0, and their weights would
        start to move. So it is with gradients of zeros, and with a learning rate that warms up from 0.

        Raises:
            ValueError: ``step`` together with ``quantize`` or ``own``, or a step needs the whole update first.
        """

    @abstractmethod
    def merge(
        self,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        *,
        lr: Sequence[float],
        sizes: Sizes | None = None,
    ) -> None:
        """``param -= gain * lr * sign(decode(mean over contributors))``, in place; 0 where nobody contributed.

        Or, where the plan's rule is ``"rms"``, by the decoded update over its root mean square, in place of the sign.
        By the definition that the plan names. In the arithmetic of floats the result depends on the order of
        ``updates`` by rounding: all peers must pass the same order.

        Args:
            updates: of all contributors, on this plan; none leaves the parameters as they are.
            params: one per tensor, of the planned shape; changed in place.
            lr: one per parameter group.
            sizes: of the whole tensors, where the plan is of a part of them and some steps have a fixed size.

        Raises:
            ConfigurationError: these updates cannot be merged by the plan's definition.
        """

    def largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        """:attr:`Sizes.largest` of the parts that are here, of tensors whose steps have a fixed size."""
        raise NotImplementedError

    def squares(self, updates: Sequence[CompressedUpdate], largest: Mapping[int, float]) -> dict[int, float | int]:
        """:attr:`Sizes.squares` of the parts that are here; ``largest`` is that of the whole tensors."""
        raise NotImplementedError

    @property
    def merges_ahead(self) -> bool:
        """Whether :meth:`merge_ahead` is worth asking, so that weights may look ahead until then."""
        return False

    def merge_ahead(
        self,
        updates: Sequence[CompressedUpdate],
        weights: Sequence[Tensor],
        shifted: Sequence[Tensor | None],
        *,
        lr: Sequence[float],
        ahead_lr: Sequence[float],
    ) -> bool:
        """:meth:`merge` of ``weights``, and ``shifted = weight - ahead_lr * sign(momentum)`` on the way, in one pass.

        By the momenta that the last :meth:`extract` left, which had ``own``; nobody has changed them since.

        Args:
            updates: as for :meth:`merge`, on the devices of the plan.
            weights: true ones, one per tensor, of the planned shape; changed in place.
            shifted: what gets the weights that look ahead, like ``weights`` and apart from them; None for a tensor that
                does not.
            lr, ahead_lr: one per parameter group.

        Returns:
            False: this engine does not, or not with these tensors; nothing has changed then.
        """
        return False

    @abstractmethod
    def decode(self, updates: Sequence[CompressedUpdate], *, sizes: Sizes | None = None) -> list[Tensor]:
        """The merged update of every tensor before its sign, in its shape and compute dtype.

        ``sizes`` as for :meth:`merge`.
        """

    @abstractmethod
    def shift(
        self,
        params: Sequence[Tensor],
        directions: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
    ) -> None:
        """``saved = param``, then ``param -= lr * sign(direction)``, or by the direction itself.

        All arguments hold as many as there are tensors to shift, not all of the plan.

        Args:
            params: of any shapes and float types; changed in place.
            directions: shaped as ``params``, float32 or float64, contiguous.
            saved: shaped as ``params`` and of their types; overwritten.
            lr: of each.
            whole: of each, whether the direction is taken as it is, not its sign.
        """

    def put_back(self, params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        """``param = saved``, for as many tensors as there are to put back; they may be anywhere, and of any types."""
        torch._foreach_copy_(list(params), list(saved))

    @property
    def defers(self) -> bool:
        """Whether :meth:`extract` takes what :meth:`finite` says from the device, so that nobody waits for it."""
        return False

    def finite(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """Which gradients are finite, and have finite squares: ``(tensors,)`` int32 of 1 and 0, on their device.

        Does not wait for it. None: this engine does not look, so that somebody else must.

        Args:
            grads: one per tensor of the plan, of any float type; what is said of those that are None means nothing.
        """
        return None

    def upload(self, updates: Sequence[CompressedUpdate]) -> list[CompressedUpdate]:
        """The updates, wherever they are, on the devices of the plan: those in main memory by one copy."""
        devices = [batch.device for batch in self.plan.batches]
        coming = [
            number
            for number, update in enumerate(updates)
            if any(index.device != device for index, device in zip(update.index, devices, strict=True))
        ]
        if not coming:
            return list(updates)
        index = [list(update.index) for update in updates]
        value = [list(update.value) for update in updates]
        waiting = [downloaded(updates[number]) for number in coming]
        for device in dict.fromkeys(devices):
            if device.type == "cpu":
                arrived = {
                    n: [(update.index[n], update.value[n]) for update in waiting]
                    for n, other in enumerate(devices)
                    if other == device
                }
            else:
                arrived = self._uploads_to(device).upload(waiting)
            for batch, parts in arrived.items():
                for number, part in zip(coming, parts, strict=True):
                    index[number][batch], value[number][batch] = part
        return [
            CompressedUpdate(update.plan, tuple(i), tuple(v), update.present)
            for update, i, v in zip(updates, index, value, strict=True)
        ]

    def _uploads_to(self, device: torch.device) -> Uploads:
        if device not in self._uploads:
            self._uploads[device] = Uploads(self.plan, device)
        return self._uploads[device]

    def download(self, update: CompressedUpdate) -> CompressedUpdate:
        """The update in main memory, complete when this returns."""
        return downloaded(update)
