"""Psyche's error correction: gradients are taken where the weights will be, not where they are.

With overlapped steps a gradient is computed before the update of the step before has arrived. What a peer has in its
momentum is its best guess of what is coming, so for the forward and backward pass it shifts its weights by
``-lr * sign(delta)`` and takes the shift back before the step (PsycheFoundation/psyche
``shared/modeling/src/distro.rs``, ``error_correction``).

Floating-point addition does not give back what subtraction took: adding the shift again changes a few per cent of the
weights by a rounding error, differently on every peer, and replicas drift apart. So the weights are kept aside and
copied back.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..compress.engine import Engine
from ..compress.engine.shifting import shifted
from ..errors import DistroError

__all__ = ["Edits", "Lookahead"]

_ALWAYS_COMPARED: Final = 1024
"""Tensors up to this size are compared at every undo, since versions do not see a write through ``.data``: small ones
are often clipped that way (CLIP's logit scale), and here the comparison costs next to nothing."""


class _Shifted(NamedTuple):
    """A tensor that looks ahead."""

    param: Tensor
    delta: Tensor
    saved: Tensor
    lr: float
    whole: bool


class Edits(enum.Enum):
    """What becomes of a tensor that other code wrote to while it looked ahead.

    Where the same shifted weights were written again (from a checkpoint of them), nothing counts as written.
    """

    MERGE = "if most elements are as they were (it was clipped, say), those are put back; otherwise all stay"
    KEEP = "it keeps what was written"
    DISCARD = "it gets its true weights back"


class Lookahead:
    """Shifts parameters in place and puts them back, bit for bit.

    Args:
        on: the parameters are shifted already, as those of a copied optimizer can be.
    """

    def __init__(self, *, on: bool = False) -> None:
        self._on = on
        # Tells whether other code has written to a tensor; None where that is unknown, as in a copied optimizer.
        self._versions: list[int] | None = None
        self._shifted: list[bool] | None = None
        self._stale = False

    @property
    def on(self) -> bool:
        """Whether the parameters are shifted."""
        return self._on

    @property
    def stale(self) -> bool:
        """Whether a step has begun and they are still shifted, by a momentum that is no more: see :meth:`stay`."""
        return self._stale

    def stay(
        self,
        params: Sequence[Tensor],
        deltas: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
    ) -> bool:
        """A step begins that ends with another lookahead. Whether ``params`` may stay as they are until then.

        ``saved`` are the true weights from now on, which the step changes; then :meth:`renewed`, or :meth:`take_off`,
        which puts back all of them. False where other code has written to weights, and as long as that is unknown.

        Args:
            params, deltas, saved, lr, whole: as in :meth:`put_on`.
        """
        if not self._on or self._versions is None or self._shifted != [_is_trained(param) for param in params]:
            return False
        tensors = [_Shifted(*one) for one in zip(params, deltas, saved, lr, whole, strict=True)]
        chosen = [
            (one, version)
            for one, version, shifts in zip(tensors, self._versions, self._shifted, strict=True)
            if shifts
        ]
        for one, version in chosen:
            alike = one.param.device == one.saved.device and one.param.dtype == one.saved.dtype
            if one.whole or not alike or one.param._version != version:
                return False
        small = [one for one, _ in chosen if one.param.numel() <= _ALWAYS_COMPARED]
        self._stale = not small or _all_are_shifted(small)
        return self._stale

    def true_weights(self, params: Sequence[Tensor], saved: Sequence[Tensor]) -> list[Tensor]:
        """Where the true weights are: ``saved`` where the parameter is shifted, otherwise the parameter itself."""
        shifted_ones = self._shifted or [False] * len(params)
        return [keep if shifts else param for param, keep, shifts in zip(params, saved, shifted_ones, strict=True)]

    def renewed(self, params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        """The ``params`` that :meth:`stay` left shifted are shifted anew, from the weights of :meth:`true_weights`."""
        frozen = [n for n, shifts in enumerate(self._shifted or ()) if not shifts]
        if frozen:
            torch._foreach_copy_([saved[n] for n in frozen], [params[n] for n in frozen])
        self._versions, self._stale = [p._version for p in params], False

    def put_on(
        self,
        params: Sequence[Tensor],
        deltas: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
        engine: Engine,
    ) -> None:
        """Copies ``params`` to ``saved``, then ``param -= lr * sign(delta)``. Frozen parameters are not shifted.

        What is not a momentum but a direction already is taken as a ``whole``, not its sign.

        Args:
            params: one per tensor, of any shapes and float types; changed in place.
            deltas: the momenta, shaped as ``params``, float32 or float64.
            saved: shaped as ``params`` and of their types; overwritten.
            lr: one learning rate per tensor.
            whole: one per tensor.
            engine: shifts them.
        """
        self._shifted = [_is_trained(param) for param in params]
        chosen = [number for number, shifts in enumerate(self._shifted) if shifts]
        for number, shifts in enumerate(self._shifted):
            if not shifts:
                saved[number].copy_(params[number])
        shifting, directions, kept = ([each[number] for number in chosen] for each in (params, deltas, saved))
        engine.shift(
            shifting, directions, kept, [lr[number] for number in chosen], [whole[number] for number in chosen]
        )
        self._versions = [p._version for p in params]
        self._on = True

    def take_off(
        self,
        params: Sequence[Tensor],
        deltas: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
        *,
        edits: Edits = Edits.MERGE,
        alone: bool = True,
        engine: Engine | None = None,
    ) -> None:
        """Copies ``saved`` back to ``params``, where no other code has written meanwhile.

        Args:
            params, deltas, saved, lr, whole: as in :meth:`put_on`; ``params`` may be on other devices and of
                other types now.
            edits: what becomes of tensors that other code wrote to.
            alone: there are no other peers, whose weights could become different.
            engine: puts them back; None leaves it to torch.

        Raises:
            DistroError: not ``alone``, and a part of a tensor was written to: each peer's weights are shifted in its
                own way, so what was written differs between peers and would differ from now on.
        """
        versions = self._versions if self._versions is not None else [-1] * len(params)
        shifted_ones = self._shifted if self._shifted is not None else [_is_trained(param) for param in params]
        tensors = [_Shifted(*one) for one in zip(params, deltas, saved, lr, whole, strict=True)]
        untouched: list[_Shifted] = []
        small: list[_Shifted] = []
        doubtful: list[_Shifted] = []
        for one, version, shifts in zip(tensors, versions, shifted_ones, strict=True):
            if edits is Edits.DISCARD or (self._stale and shifts):
                untouched.append(one)
            elif shifts:
                same = one.param._version == version
                (doubtful if not same else untouched if one.param.numel() > _ALWAYS_COMPARED else small).append(one)
        if small:
            (untouched if _all_are_shifted(small) else doubtful).extend(small)
        for param, delta, keep, rate, as_it_is in doubtful:
            # The parameter may be on another device and of another type by now: module.to(...) writes through .data.
            unwritten = param == shifted(keep.clone(), delta, rate, as_it_is).to(param)
            count = int(unwritten.sum())
            if count == param.numel():
                param.copy_(keep)
            elif not alone and edits is Edits.MERGE and count > param.numel() // 8:
                raise DistroError(
                    "weights were changed (clipped, say) while they looked ahead, differently on each peer, so that "
                    "the peers would differ from now on: change them between optimizer.eval() and optimizer.train()"
                )
            elif count > param.numel() // 2 and edits is Edits.MERGE:
                param.copy_(torch.where(unwritten, keep.to(param), param))
        if untouched:
            put_back = torch._foreach_copy_ if engine is None else engine.put_back
            put_back([one.param for one in untouched], [one.saved for one in untouched])
        self._versions, self._shifted, self._on, self._stale = None, None, False, False


def _is_trained(param: Tensor) -> bool:
    # Plain tensors, whose gradients are set by hand, need not require any.
    return param.requires_grad or not isinstance(param, Parameter)


def _all_are_shifted(tensors: Sequence[_Shifted]) -> bool:
    """Whether nobody has written to any of them; one look at a device, for all tensors together.

    May say no for want of a bit of rounding: then they are looked at one by one.
    """
    kinds: dict[tuple[torch.device, torch.dtype, torch.dtype, float, bool], list[_Shifted]] = {}
    for one in tensors:
        param, delta, keep, rate, as_it_is = one
        if not (param.device == delta.device == keep.device and param.dtype == keep.dtype):
            return False
        kinds.setdefault((param.device, param.dtype, delta.dtype, rate, as_it_is), []).append(one)
    same = []
    for (_, _, _, rate, as_it_is), members in kinds.items():
        saved = torch.cat([one.saved.reshape(-1) for one in members])
        deltas = torch.cat([one.delta.reshape(-1) for one in members])
        params = torch.cat([one.param.reshape(-1) for one in members])
        same.append((params == shifted(saved, deltas, rate, as_it_is)).all())
    return all(torch.stack([one.to(same[0].device) for one in same]).tolist())
