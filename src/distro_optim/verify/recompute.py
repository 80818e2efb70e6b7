"""Test 1: does a result agree with the gradient of the batch that its sender was given?

What a peer sends depends on its momentum, which nobody else has, so another one that trains the same batch chooses
other coefficients. But their *signs* are mostly those of the gradient: at each position that was sent, the sign that
was sent is compared with the sign of the DCT coefficient, there, of a gradient that the auditor computes itself. For
this the auditor needs the weights of the step and the batch; no momentum, no lookahead, no message from the peer and no
change of the protocol. It works on any result, of Psyche's clients, of our own kind, and of a recorded round.

The same is asked of a control batch, which nobody was given: two batches of one data set have much of their gradients
in common, so that only the *excess* of the first over the second says that it was this batch.

Catches: copies of another peer's result, momentum without training, other data, random and flipped signs. Misses: a
lookahead that was left out, a few flipped signs in a small model, and the half of a batch, unless the two halves are
asked apart (:attr:`Evidence.halves`). With N coefficients the standard error of an agreement is ``0.5 / sqrt(N)``.

Where a gradient has no coefficient at all, as in the rows of an embedding that no token of the batch has, there is
nothing to compare; such positions do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from ..compress import CompressedUpdate, TilePlan
from ..compress.dct import dct_basis
from ..compress.plan import Batch, Block
from ..compress.windows import gather
from ..errors import ConfigurationError

__all__ = [
    "Agreement",
    "Evidence",
    "Gradients",
    "Signs",
    "coefficients_at",
    "compare",
    "compare_signs",
    "expected_of",
    "group_of",
    "signs_at",
    "signs_of",
    "tiles_of",
]

Gradients = Sequence[Tensor | None]
"""One per tensor of the plan, shaped as it; None where there is no gradient."""

_HALF: Final = 0.5
"""The agreement of signs that have nothing to do with each other, and the standard deviation of one such sign."""

_NUMBERS: Final = re.compile(r"(?<![^.])\d+(?![^.])")
"""The parts of a tensor's name that count layers."""


@dataclass(frozen=True)
class Agreement:
    """How many signs agree, of how many that could be compared. Two of them can be added.

    Attributes:
        agree, total: counts of coefficients.
    """

    agree: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """0 to 1; 0.5 for signs that have nothing to do with each other, also where there is nothing to compare."""
        return self.agree / self.total if self.total else _HALF

    @property
    def error(self) -> float:
        """The standard error of :attr:`share` where signs are as good as tossed; infinite where there are none."""
        return _HALF / math.sqrt(self.total) if self.total else math.inf

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(self.agree + other.agree, self.total + other.total)


@dataclass(frozen=True)
class Signs:
    """Signs at the positions of an update, as rows ``(tiles, k)`` for each batch of its plan.

    Attributes:
        plan: of the update.
        negative: bool, whether it is below 0.
        known: bool, whether there is a sign: the number is finite and not 0, and the tensor is present.
    """

    plan: TilePlan
    negative: tuple[Tensor, ...]
    known: tuple[Tensor, ...]

    def agreements(self, other: Signs) -> list[Agreement]:
        """With other signs at the same positions, one per tensor of the plan."""
        found = [Agreement()] * len(self.plan)
        for number, batch in enumerate(self.plan.batches):
            known = self.known[number] & other.known[number]
            agree = known & (self.negative[number] == other.negative[number])
            for tensor, (start, stop) in batch.ranges.items():
                found[tensor] = Agreement(int(agree[start:stop].sum()), int(known[start:stop].sum()))
        return found


@dataclass(frozen=True)
class Evidence:
    """What test 1 says of one result, or of several that are added up.

    Attributes:
        assigned: with the gradient of the batch that its sender was given.
        control: with that of a batch that nobody was given.
        only_assigned, only_control: positions at which the sign agrees with one of the two and not with the other;
            what both agree with, or neither, says nothing about which of them was trained.
        halves: with the gradients of the two halves of the batch, one by one; None if they were not computed.
        sent: coefficients that the result has.
        expected: coefficients that a result has of all tensors of which the auditor has a gradient that is not 0.
        by_group: ``assigned`` and ``control`` of tensors of the same kind, by :func:`group_of`.
    """

    assigned: Agreement = Agreement()
    control: Agreement = Agreement()
    only_assigned: int = 0
    only_control: int = 0
    halves: tuple[Agreement, Agreement] | None = None
    sent: int = 0
    expected: int = 0
    by_group: Mapping[str, tuple[Agreement, Agreement]] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """By how much more it agrees with the assigned batch than with the control, -1 to 1."""
        return self.assigned.share - self.control.share

    @property
    def excess_error(self) -> float:
        """The standard error of :attr:`excess` where neither batch was trained (McNemar); infinite without any."""
        apart = self.only_assigned + self.only_control
        return math.sqrt(apart) / self.assigned.total if apart and self.assigned.total else math.inf

    @property
    def imbalance(self) -> float | None:
        """By how much more it agrees with one half of the batch than with the other, 0 to 1; None if not computed."""
        return None if self.halves is None else abs(self.halves[0].share - self.halves[1].share)

    @property
    def coverage(self) -> float:
        """The share of the expected coefficients that were sent, 0 to 1; 1 where none are expected."""
        return min(1.0, self.sent / self.expected) if self.expected else 1.0

    def __add__(self, other: Evidence) -> Evidence:
        groups = dict(self.by_group)
        for name, (assigned, control) in other.by_group.items():
            before = groups.get(name, (Agreement(), Agreement()))
            groups[name] = before[0] + assigned, before[1] + control
        halves = None
        if self.halves is not None and other.halves is not None:
            halves = self.halves[0] + other.halves[0], self.halves[1] + other.halves[1]
        return Evidence(
            assigned=self.assigned + other.assigned,
            control=self.control + other.control,
            only_assigned=self.only_assigned + other.only_assigned,
            only_control=self.only_control + other.only_control,
            halves=halves,
            sent=self.sent + other.sent,
            expected=self.expected + other.expected,
            by_group=groups,
        )

    def record(self) -> dict[str, object]:
        """For JSON."""
        error = self.excess_error
        return {
            "coefficients": self.assigned.total,
            "assigned": self.assigned.share,
            "control": self.control.share,
            "excess": self.excess,
            "excess_error": error if math.isfinite(error) else None,
            "imbalance": self.imbalance,
            "coverage": self.coverage,
            "groups": {
                name: {"coefficients": a.total, "assigned": a.share, "control": c.share}
                for name, (a, c) in self.by_group.items()
            },
        }


def compare(
    update: CompressedUpdate,
    assigned: Gradients,
    control: Gradients,
    *,
    halves: tuple[Gradients, Gradients] | None = None,
    names: Sequence[str] | None = None,
) -> Evidence:
    """Test 1 of one result.

    Args:
        update: what was sent.
        assigned: gradients of the batch that its sender was given, at the weights of that step.
        control: those of a batch that nobody was given, at the same weights.
        halves: those of the first and of the second half of the assigned batch.
        names: of the tensors, in the order of the plan, for :attr:`Evidence.by_group`; None for no groups.

    Raises:
        ConfigurationError: gradients are not those of the plan's tensors.
    """
    return compare_signs(
        update,
        signs_at(update, assigned),
        signs_at(update, control),
        halves=None if halves is None else (signs_at(update, halves[0]), signs_at(update, halves[1])),
        names=names,
        expected=expected_of(update.plan, assigned),
    )


def compare_signs(
    update: CompressedUpdate,
    assigned: Signs,
    control: Signs,
    *,
    halves: tuple[Signs, Signs] | None = None,
    names: Sequence[str] | None = None,
    expected: int = 0,
) -> Evidence:
    """:func:`compare`, where the gradients are gone and their signs at the update's positions are left.

    Args:
        update, assigned, control, halves, names: as there.
        expected: coefficients that were to be sent, by :func:`expected_of`; 0 if that is unknown.
    """
    sent = signs_of(update)
    with_assigned, with_control = sent.agreements(assigned), sent.agreements(control)
    only_assigned = only_control = 0
    for number, known in enumerate(sent.known):
        both = known & assigned.known[number] & control.known[number]
        first = sent.negative[number] == assigned.negative[number]
        second = sent.negative[number] == control.negative[number]
        only_assigned += int((both & first & ~second).sum())
        only_control += int((both & second & ~first).sum())
    groups: dict[str, tuple[Agreement, Agreement]] = {}
    for name, one, other in zip(names or (), with_assigned, with_control, strict=bool(names)):
        before = groups.get(group_of(name), (Agreement(), Agreement()))
        groups[group_of(name)] = before[0] + one, before[1] + other
    apart = None
    if halves is not None:
        first_half, second_half = (_total(sent.agreements(half)) for half in halves)
        apart = first_half, second_half
    return Evidence(
        assigned=_total(with_assigned),
        control=_total(with_control),
        only_assigned=only_assigned,
        only_control=only_control,
        halves=apart,
        sent=sum(int(known.sum()) for known in sent.known),
        expected=expected,
        by_group=groups,
    )


def group_of(name: str) -> str:
    """The kind of a tensor: its name without the numbers of layers, such as ``layers.*.mlp.weight``."""
    return _NUMBERS.sub("*", name)


def signs_of(update: CompressedUpdate) -> Signs:
    """What an update says, in signs: of bits, or of values, where 0 and what is no number say nothing."""
    negative, known = [], []
    for batch, value in zip(update.plan.batches, update.value, strict=True):
        said = torch.ones_like(value, dtype=torch.bool)
        if value.dtype != torch.bool:
            said = value.isfinite() & (value != 0)
        for tensor, (start, stop) in batch.ranges.items():
            if not update.present[tensor]:
                said[start:stop] = False
        known.append(said)
        negative.append(value if value.dtype == torch.bool else value < 0)
    return Signs(update.plan, tuple(negative), tuple(known))


def signs_at(update: CompressedUpdate, gradients: Gradients) -> Signs:
    """The signs of gradients where an update has its own. Much smaller than the gradients.

    Raises:
        ConfigurationError: gradients are not those of the plan's tensors.
    """
    found = coefficients_at(update, gradients)
    known = tuple(value.isfinite() & (value != 0) for value in found)
    return Signs(update.plan, tuple(value < 0 for value in found), known)


def expected_of(plan: TilePlan, gradients: Gradients) -> int:
    """Coefficients that a result has of the tensors whose gradient is not 0 all over."""
    return sum(
        grid.tiles * k
        for grid, k, gradient in zip(plan.grids, plan.topk, gradients, strict=True)
        if gradient is not None and bool(gradient.any())
    )


@torch.no_grad()
def coefficients_at(update: CompressedUpdate, gradients: Gradients) -> list[Tensor]:
    """The DCT coefficients of gradients where an update has its own, ``(tiles, k)`` for each batch of the plan.

    Only these are computed: ``k`` of a tile's basis functions, and not the whole transform.

    Args:
        update: the positions.
        gradients: on the devices of the plan.

    Raises:
        ConfigurationError: gradients are not those of the plan's tensors.
    """
    _check(update.plan, gradients)
    gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
    found = []
    for batch, index in zip(update.plan.batches, update.index, strict=True):
        out = torch.empty(index.shape, dtype=batch.compute_dtype, device=batch.device)
        rows_h = dct_basis(batch.h, batch.compute_dtype, batch.device).t().contiguous()
        rows_w = dct_basis(batch.w, batch.compute_dtype, batch.device).t().contiguous()
        for block in batch.blocks:
            tiles = tiles_of(batch, block, gradients)
            # An update of a stranger was checked; one that was made here is right.
            where = index[block.start : block.stop].long()
            row = torch.div(where, batch.w, rounding_mode="floor")
            right = rows_w[where - row * batch.w]  # (n, k, w)
            half = torch.bmm(tiles, right.transpose(1, 2))  # (n, h, k)
            out[block.start : block.stop] = (half * rows_h[row].transpose(1, 2)).sum(1)
        found.append(out)
    return found


def tiles_of(batch: Batch, block: Block, tensors: Gradients) -> Tensor:
    """The tiles of a block in contiguous tensors, ``(n, h, w)`` of the compute dtype; 0 where there is nothing."""
    tiles = torch.zeros(block.tiles, batch.h, batch.w, dtype=batch.compute_dtype, device=batch.device)
    gather(block, tensors, tiles)
    return tiles


# -- inside ------------------------------------------------------------------------------------------------------------


def _total(agreements: Iterable[Agreement]) -> Agreement:
    return sum(agreements, Agreement())


def _check(plan: TilePlan, gradients: Gradients) -> None:
    if len(gradients) != len(plan):
        raise ConfigurationError(
            f"{len(gradients)} gradients for the {len(plan)} tensors of the result: give one for each, in its order",
            name="gradients",
        )
    for number, (spec, gradient) in enumerate(zip(plan.specs, gradients, strict=True)):
        if gradient is not None and tuple(gradient.shape) != spec.shape:
            raise ConfigurationError(
                f"gradients[{number}] has shape {tuple(gradient.shape)}, the tensor of the result {spec.shape}: they "
                "are of another model, or in another order",
                name="gradients",
            )
