"""Test 2: does a trainer's momentum follow from the one before, by the batch that it was given?

Every link "momentum after step h-1, momentum after step h" of the chain can be asked for, and nobody knows which one
will be before it is committed to. In the order of time:

1. After each step a trainer sends a signed :class:`~.momentum.MomentumCommitment`.
2. The random seed of a later round says who is audited, by whom and which leaves: :func:`draw`. Anybody can check
   the drawing, and nobody knew the seed when the commitments were made.
3. The trainer sends an :class:`~.opening.Opening`. One that sends none in time has failed.
4. Each auditor takes the gradient of the trainer's batch at the weights that looked ahead as the trainer's did
   (:func:`looking_ahead`, :mod:`.quiet`), and :func:`check` computes for the opened tiles
   ``delta = decay * (delta_before - own) + lr * gradient``, where ``own`` is what was sent in h-1, and from that what
   was to be sent. Three distances (:mod:`.similarity`) say how far the claims are from it.

Catches: everything that test 1 catches, and half of a batch, a lookahead that was left out, single signs that were
flipped, a momentum that was made up. A lie about a share ``f`` of the leaves is found with the probability
``1 - (1 - f)**16``. Misses: what an honest computation on the right data would give. The gradient is the auditor's, so
an auditor can lie, too: one verdict alone decides nothing, and anybody can repeat it.

Only ``direction="momentum"`` and ``overlap=True``: Muon's direction needs whole matrices, of which tiles say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from ..compress import CompressedUpdate, TilePlan, make_plan
from ..compress.dct import make_transform
from ..compress.plan import Batch
from ..compress.tiling import Tiling
from ..compress.topk import select_topk
from ..errors import ConfigurationError
from .calibrate import Limits, Noise
from .momentum import Leaves, MomentumCommitment, leaf_digest, leaves_of, root_from
from .opening import Opening, max_opening_bytes
from .recompute import Gradients
from .similarity import hamming_distance, jaccard_distance, manhattan_distance

__all__ = [
    "AUDITORS",
    "LEAVES",
    "MAX_OPENING_BYTES",
    "Challenge",
    "Verdict",
    "check",
    "draw",
    "draw_results",
    "is_auditable",
    "leaves_to_open",
    "looking_ahead",
    "majority",
]

LEAVES: Final = 16
"""That are opened. A lie about a tenth of them is found with a probability of 0.81, about a third with 0.998."""

AUDITORS: Final = 3
"""Of each audited trainer; two of them decide."""

MAX_OPENING_BYTES: Final = 256 << 20
"""That an opening may have. A model of two billion parameters has it; of a larger one nobody shows its momentum."""

LEAST_ADDED: Final = 1e-4
"""Of the momentum, that a step counts as having added at least. Where it added nothing, as in rows of an embedding
whose tokens do not occur or at a learning rate of 0, the rounding of what is kept (1e-7) would be all, and look like a
lie. A lazy trainer is found as long as a step adds 5e-6. Chosen between the two."""

_DRAW: Final = b"distro-optim audit 1"
_DRAW_RESULTS: Final = b"distro-optim audit of results 1"


@dataclass(frozen=True)
class Challenge:
    """Who is audited, by whom, and what is to be opened.

    Attributes:
        trainer: its public key.
        auditors: public keys.
        leaves: numbers, ascending.
    """

    trainer: bytes
    auditors: tuple[bytes, ...]
    leaves: tuple[int, ...]


def draw(
    seed: int, step: int, plan: TilePlan, trainers: Sequence[bytes], auditors: Sequence[bytes], fraction: float
) -> list[Challenge]:
    """The audits of a step, from the random seed of a later round. The same for everybody who asks.

    Whether a trainer is drawn does not depend on who else is there, so that peers whose lists differ for a moment agree
    about most. Leaves are drawn by their elements: small ones, of which a model may have many, come up as rarely as
    they weigh little.

    Args:
        seed: of the first round that begins when all results of the step are with everybody, 64 bits.
        step: that is audited.
        plan: of the run.
        trainers: public keys of those who sent a result in it.
        auditors: of those who may audit; nobody audits itself.
        fraction: of the trainers to audit, 0 to 1.
    """
    return [
        Challenge(trainer, chosen, leaves_to_open(seed, step, plan, trainer))
        for trainer, chosen in _drawn(_base(_DRAW, seed, step), trainers, auditors, fraction)
    ]


def draw_results(
    seed: int, step: int, trainers: Sequence[bytes], auditors: Sequence[bytes], fraction: float
) -> list[tuple[bytes, tuple[bytes, ...]]]:
    """The audits of a step by test 1: who is audited, and by whom. Others than those of :func:`draw` with this seed.

    Args:
        seed, step, trainers, auditors, fraction: as there.
    """
    return _drawn(_base(_DRAW_RESULTS, seed, step), trainers, auditors, fraction)


def leaves_to_open(seed: int, step: int, plan: TilePlan, trainer: bytes) -> tuple[int, ...]:
    """Of :func:`draw`, the leaves of a trainer, whether it is drawn or not."""
    return _draw_leaves(_base(_DRAW, seed, step), trainer, leaves_of(plan))


def is_auditable(plan: TilePlan) -> bool:
    """Whether this test says something of peers with this plan: their arithmetic is exact, what goes into the momentum
    is the gradient, and an opening has a size that can be sent."""
    return plan.derived(_is_auditable)


def _is_auditable(plan: TilePlan) -> bool:
    if plan.arithmetic != "exact" or max_opening_bytes(plan, LEAVES) > MAX_OPENING_BYTES:
        return False
    # Other directions and transforms go into the layout.
    tilings: tuple[Tiling, ...] = get_args(Tiling)
    return any(make_plan(plan.specs, tiling, arithmetic="exact").layout == plan.layout for tiling in tilings)


def _drawn(
    base: bytes, trainers: Sequence[bytes], auditors: Sequence[bytes], fraction: float
) -> list[tuple[bytes, tuple[bytes, ...]]]:
    found = []
    for trainer in sorted(set(trainers)):
        if _number(base, b"trainer", trainer) >= fraction * 2**64:
            continue
        others = sorted(set(auditors) - {trainer}, key=lambda key: _number(base, b"auditor", trainer + key))
        found.append((trainer, tuple(others[:AUDITORS])))
    return found


def _base(what: bytes, seed: int, step: int) -> bytes:
    return what + seed.to_bytes(8, "little") + step.to_bytes(4, "little")


def _number(base: bytes, what: bytes, key: bytes) -> int:
    return int.from_bytes(blake3(base + what + key).digest(length=8), "little")


def _draw_leaves(base: bytes, trainer: bytes, leaves: Leaves) -> tuple[int, ...]:
    elements = leaves.elements_before[-1]
    wanted = min(LEAVES, len(leaves))
    found: set[int] = set()
    count = 0
    while len(found) < wanted:
        if count == 64 * LEAVES:  # of a few large leaves and many tiny ones
            found.update([n for n in range(len(leaves)) if n not in found][: wanted - len(found)])
            break
        found.add(leaves.holding(_number(base, b"leaf", trainer + count.to_bytes(4, "little")) % elements))
        count += 1
    return tuple(sorted(found))


@torch.no_grad()
def looking_ahead(weights: Mapping[str, Tensor], signs: Sequence[Tensor], rates: Sequence[float]) -> dict[str, Tensor]:
    """The weights at which a trainer took its gradient, in new tensors.

    Args:
        weights: of the run at the beginning of the step, by name, in the order of the plan.
        signs: of an opening.
        rates: of the step before, one for each tensor.
    """
    # As the trainer does it: the product is rounded together with the sum.
    return {
        name: weight.detach().clone().add_(sign.to(device=weight.device, dtype=torch.float32), alpha=-rate)
        for (name, weight), sign, rate in zip(weights.items(), signs, rates, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What an audit found.

    Attributes:
        reasons: what speaks against the trainer, in words; empty if nothing does.
        jaccard: distance of the positions that were sent from those that were to be sent.
        hamming: share of the positions common to both whose signs differ.
        manhattan: of the momentum afterwards as claimed from the recomputed one, over the size of the part that the
            step has added (:data:`LEAST_ADDED`); of single values where values are sent.
        coefficients: that were compared.
    """

    reasons: tuple[str, ...]
    jaccard: float = 0.0
    hamming: float = 0.0
    manhattan: float = 0.0
    coefficients: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the trainer."""
        return not self.reasons

    def noise(self) -> Noise:
        """Of an honest peer that audited itself."""
        return Noise(jaccard=self.jaccard, hamming=self.hamming, manhattan=self.manhattan)

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {**vars(self), "reasons": list(self.reasons), "passed": self.passed}


def majority(verdicts: Sequence[Verdict]) -> bool | None:
    """Whether a trainer passed, by two auditors that agree; None if there are none."""
    against = sum(not verdict.passed for verdict in verdicts)
    if against >= 2:
        return False
    return True if len(verdicts) - against >= 2 else None


@torch.no_grad()
def check(
    opening: Opening,
    *,
    challenge: Challenge,
    step: int,
    before: MomentumCommitment,
    after: MomentumCommitment,
    previous: CompressedUpdate | None,
    sent: CompressedUpdate,
    gradients: Gradients,
    rates: Sequence[float],
    decays: Sequence[float],
    limits: Limits,
) -> Verdict:
    """Audits a trainer.

    Args:
        opening: its answer, on the plan of ``sent``.
        challenge: the question.
        step: that is audited.
        before, after: what the trainer has committed to, after ``step - 1`` and after ``step``.
        previous: its result of ``step - 1`` if that left the momentum; None if it sent none.
        sent: its result of ``step``.
        gradients: of its batch, at the weights of :func:`looking_ahead`, clipped as the run clips them.
        rates: learning rates of ``step``, one per parameter group.
        decays: of the momentum, likewise.
        limits: of the run.

    Raises:
        ConfigurationError: gradients are not those of the plan.
    """
    plan = sent.plan
    if len(gradients) != len(plan):
        raise ConfigurationError(f"{len(gradients)} gradients for {len(plan)} tensors", name="gradients")
    reasons = _what_is_not_as_committed(opening, challenge, step, before, after, plan)
    if reasons:
        return Verdict(reasons=tuple(reasons))
    gradients = [None if g is None else g.detach().to("cpu").contiguous() for g in gradients]
    sums = _Sums()
    for leaf in opening.leaves:
        number, start, stop = leaves_of(plan).place(leaf.number)
        batch = plan.batches[number]
        shape = (stop - start, batch.h, batch.w)
        old, new = (
            torch.frombuffer(bytearray(data), dtype=batch.compute_dtype).view(shape)
            for data in (leaf.before, leaf.after)
        )
        looked = _cut_out(batch, start, stop, opening.signs)
        if not torch.equal(old.sign(), looked):
            reasons.append(f"leaf {leaf.number}: the signs it says it looked ahead with are not those of its momentum")
            break
        if not bool(old.isfinite().all() and new.isfinite().all()):
            reasons.append(f"leaf {leaf.number}: the momentum is not finite")
            break
        rows = slice(start, stop)
        tile_of = _Tiles(batch, rows, number, gradients, previous, sent)
        expected, added = tile_of.next_momentum(old, rates[batch.group], decays[batch.group])
        sums.add(tile_of, expected, added, new)
    if reasons:
        return Verdict(reasons=tuple(reasons))
    return sums.verdict(limits)


# -- inside ------------------------------------------------------------------------------------------------------------


def _what_is_not_as_committed(
    opening: Opening,
    challenge: Challenge,
    step: int,
    before: MomentumCommitment,
    after: MomentumCommitment,
    plan: TilePlan,
) -> list[str]:
    if opening.step != step or tuple(leaf.number for leaf in opening.leaves) != challenge.leaves:
        return ["it opened other leaves than it was asked for, or those of another step"]
    if (before.step, after.step) != (step - 1, step) or {before.layout, after.layout} != {plan.layout}:
        return ["its commitments are to another step or to another model"]
    for leaf in opening.leaves:
        for data, path, commitment in (
            (leaf.before, leaf.path_before, before),
            (leaf.after, leaf.path_after, after),
        ):
            if root_from(leaf_digest(leaf.number, data), leaf.number, path) != commitment.root:
                return [f"leaf {leaf.number} is not the one that it committed to after step {commitment.step}"]
    return []


def _cut_out(batch: Batch, start: int, stop: int, tensors: Gradients) -> Tensor:
    """Tiles ``start`` to ``stop`` of a batch, ``(n, h, w)``, of contiguous tensors on the CPU; 0 where none is."""
    tiles = torch.zeros(stop - start, batch.h, batch.w, dtype=batch.compute_dtype)
    for number, place in enumerate(batch.places[start:stop].tolist()):
        param, offset, stride, rows, columns, _ = place
        tensor = tensors[param]
        if tensor is not None:
            window = tensor.as_strided((rows, columns), (stride, 1), tensor.storage_offset() + offset)
            tiles[number, :rows, :columns] = window
    return tiles


class _Tiles:
    """The tiles of one leaf, and what is known of them."""

    def __init__(
        self,
        batch: Batch,
        rows: slice,
        number: int,
        gradients: Gradients,
        previous: CompressedUpdate | None,
        sent: CompressedUpdate,
    ) -> None:
        self.batch = batch
        self.transform = make_transform("dct", batch.h, batch.w, batch.compute_dtype, torch.device("cpu"))
        self.index = sent.index[number][rows].to("cpu").long()
        self.value = sent.value[number][rows].to("cpu")
        self.said = _present(batch, rows, sent.present)
        self._gradient = _cut_out(batch, rows.start, rows.stop, gradients)
        self._inside = _inside(batch, rows)
        self.has_gradient = _present(batch, rows, [g is not None for g in gradients])
        self._left: tuple[Tensor, Tensor, Tensor] | None = None
        if previous is not None:
            index, value = previous.index[number][rows], previous.value[number][rows]
            self._left = index.to("cpu").long(), value.to("cpu"), _present(batch, rows, previous.present)

    def coefficients(self, tiles: Tensor) -> Tensor:
        """``(n, h * w)``."""
        tiles = tiles.contiguous()
        out, scratch = torch.empty_like(tiles), torch.empty_like(tiles)
        return self.transform.encode([tiles], out=out, scratch=scratch).flatten(1)

    def next_momentum(self, old: Tensor, rate: float, decay: float) -> tuple[Tensor, Tensor]:
        """What the momentum has to be after the step, and what of it the step has added, both ``(n, h, w)``."""
        left = old
        if self._left is not None:
            index, value, present = self._left
            if value.dtype == torch.bool:  # what left the momentum were the coefficients themselves
                value = self.coefficients(old).gather(1, index)
            value = value.to(old.dtype) * present[:, None]
            leaving = self.transform.decode_sparse(index, value, out=torch.empty_like(old))
            left = old - leaving * self._inside
        keep = torch.where(self.has_gradient, decay, 1.0).to(old.dtype)[:, None, None]
        added = rate * self._gradient
        return keep * left + added, added


def _present(batch: Batch, rows: slice, present: Sequence[bool]) -> Tensor:
    """Of each tile, whether its tensor is, ``(n,) bool``."""
    found = torch.zeros(batch.tiles, dtype=torch.bool)
    for tensor, (start, stop) in batch.ranges.items():
        found[start:stop] = present[tensor]
    return found[rows]


def _inside(batch: Batch, rows: slice) -> Tensor:
    """Which elements of tiles lie in their tensors, ``(n, h, w) bool``."""
    height, width = (torch.from_numpy(batch.places[rows, column]) for column in (3, 4))
    down, across = torch.arange(batch.h), torch.arange(batch.w)
    return (down[None, :, None] < height[:, None, None]) & (across[None, None, :] < width[:, None, None])


class _Sums:
    """What is compared, over all leaves."""

    def __init__(self) -> None:
        self._wanted: list[Tensor] = []
        self._claimed: list[Tensor] = []
        self._signs: list[tuple[Tensor, Tensor]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        self._apart = self._size = self._whole = 0.0
        self._offset = self._coefficients = 0

    def add(self, tiles: _Tiles, expected: Tensor, added: Tensor, claimed: Tensor) -> None:
        """One leaf: the momentum afterwards as it has to be, what the step has added to it, and as it is claimed."""
        self._apart += float(manhattan_distance(expected.numpy(), claimed.numpy()))
        # In what it keeps, which may be far more, an honest and a lazy trainer are alike.
        self._size += float(added.abs().sum())
        self._whole += float(expected.abs().sum())
        coefficients = tiles.coefficients(expected)
        index, value = select_topk(coefficients, tiles.batch.k, scratch=torch.empty_like(coefficients))
        said = tiles.said[:, None]
        # A tile of zeros has no largest coefficients.
        wanted = (value != 0) & tiles.has_gradient[:, None]
        places = torch.arange(len(index))[:, None] * tiles.batch.tile_size + self._offset
        self._wanted.append((index + places)[wanted])
        self._claimed.append((tiles.index + places)[wanted.any(1, keepdim=True).expand_as(tiles.index) & said])
        theirs = coefficients.gather(1, tiles.index)
        # Only where both chose the position: of another one the sign may be anything.
        common = (tiles.index[:, :, None] == index[:, None, :]).any(2) & (theirs != 0) & said
        if tiles.value.dtype == torch.bool:
            self._signs.append(((theirs < 0)[common], tiles.value[common]))
        else:
            self._signs.append(((theirs < 0)[common], (tiles.value < 0)[common]))
            self._values.append((theirs[common], tiles.value[common].to(theirs.dtype)))
        self._offset += len(index) * tiles.batch.tile_size
        self._coefficients += int(wanted.sum())

    def verdict(self, limits: Limits) -> Verdict:
        """The distances, beside their limits."""
        wanted, claimed = _joined(self._wanted), _joined(self._claimed)
        # Places as ranks, which are exact in float32.
        _, ranks = np.unique(np.concatenate([wanted, claimed]), return_inverse=True)
        jaccard = jaccard_distance(ranks[: len(wanted)], ranks[len(wanted) :])
        ours, theirs = (_joined([pair[side] for pair in self._signs]) for side in (0, 1))
        hamming = hamming_distance(ours, theirs) if len(ours) else 0.0
        size = max(self._size, LEAST_ADDED * self._whole)
        manhattan = self._apart / size if size else float(self._apart > 0)
        if self._values:
            exact, said = (_joined([pair[side] for pair in self._values]) for side in (0, 1))
            sent = float(np.abs(exact).sum())
            if len(exact) and sent:
                manhattan = max(manhattan, manhattan_distance(exact, said) / sent)
        reasons = []
        for name, found, most in (
            ("Jaccard distance of the positions", jaccard, limits.jaccard),
            ("Hamming distance of the signs", hamming, limits.hamming),
            ("Manhattan distance of the momentum", manhattan, limits.manhattan),
        ):
            if not found <= most:
                reasons.append(f"{name} {found:.4f}, at most {most:.4f} expected")
        return Verdict(
            reasons=tuple(reasons),
            jaccard=jaccard,
            hamming=hamming,
            manhattan=manhattan,
            coefficients=self._coefficients,
        )


def _joined(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([part.reshape(-1) for part in parts]).numpy() if parts else np.zeros(0, np.int64)
