"""Steps by the kernels, where they are for a batch, and by torch where they are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ....errors import ConfigurationError
from ...exact.definition import MAX_CONTRIBUTORS
from ...merging import Ahead, Sizes
from ...plan import Batch, TilePlan
from ...update import CompressedUpdate
from ...windows import Contiguous
from ..base import Engine, Intake
from ..blocks import BlockEngine
from ..deferred import DeferredUpdate
from ..looking import ShareOut
from . import launching
from .batches import KernelBatch
from .lists import SHIFTED, Lists
from .tables import fits
from .trial import extraction_differs, merge_differs

__all__ = ["TritonEngine"]


class TritonEngine(Engine):
    """One launch for all tensors of a batch, for each half of a step.

    The kernels are for tiles with sides of up to 64 and up to 64 coefficients, tensors of float32, bfloat16 and
    float16, ``arithmetic="exact"`` and ``transform="dct"``, on GPUs of CUDA and ROCm. Steps of a fixed size
    (``update="rms"``) are extracted by kernels and merged by torch. Everything else is torch's.

    Before a batch's first step one block of it is done by both, on copies. Where the results differ, or a kernel cannot
    be compiled, torch does that batch from then on, and a warning says so.

    Args:
        plan, transform, share, workers: as for :class:`~distro_optim.compress.engine.blocks.BlockEngine`.
    """

    def __init__(self, plan: TilePlan, transform: str, share: ShareOut | None = None, workers: int = 1) -> None:
        super().__init__(plan)
        self._blocks_of: Callable[[Sequence[int]], BlockEngine] = lambda numbers: BlockEngine(
            plan, transform, share, workers, batches=numbers
        )
        chosen = [n for n, b in enumerate(plan.batches) if self._runs(b, transform)]
        if len(chosen) < len(plan.batches) and not any(self._has_device(b) for b in plan.batches):
            warnings.warn(
                "engine='triton' is for GPUs of CUDA and ROCm, and no parameters are on one: torch takes the steps. "
                "Move the model before the first step, or give engine='auto'",
                UserWarning,
                stacklevel=2,
            )
        kernels = {n: KernelBatch(n, plan.batches[n], len(plan)) for n in chosen}
        self._extracts = dict(kernels)
        self._merges = {n: k for n, k in kernels.items() if k.batch.update == "sign"}
        self._tried: set[tuple[str, int]] = set()
        self._signs = False  # whether the kernels hold the signs of the momenta that the last extraction left
        self._looks = len(chosen) == len(plan.batches) and len({b.device for b in plan.batches}) == 1
        self._lists = Lists()
        self._rest: dict[tuple[int, ...], BlockEngine] = {}

    def _runs(self, batch: Batch, transform: str) -> bool:
        return self.plan.arithmetic == "exact" and transform == "dct" and fits(batch) and self._has_device(batch)

    @staticmethod
    def _has_device(batch: Batch) -> bool:
        return batch.device.type == launching.device_type()

    def _whole(self, ours: dict[int, KernelBatch]) -> bool:
        """Whether nothing is left to torch."""
        return len(ours) == len(self.plan.batches)

    def _without(self, ours: dict[int, KernelBatch]) -> BlockEngine:
        """Torch for all other batches."""
        numbers = tuple(n for n in range(len(self.plan.batches)) if n not in ours)
        if numbers not in self._rest:
            self._rest[numbers] = self._blocks_of(numbers)
        return self._rest[numbers]

    def _fall_back(self, half: str, ours: dict[int, KernelBatch], number: int, why: str) -> None:
        batch = ours.pop(number).batch
        warnings.warn(
            f"engine='triton': torch does the {half} of tiles of {batch.h} x {batch.w} from now on, more slowly: "
            f"{why}. engine='torch' leaves the kernels alone",
            UserWarning,
            stacklevel=2,
        )

    def _try(self, half: str, ours: dict[int, KernelBatch], trial: Callable[[KernelBatch], str | None]) -> None:
        """Before the first step: takes those batches out of ``ours`` that the kernels cannot do here."""
        for number, kernels in list(ours.items()):
            if (half, number) not in self._tried:
                self._tried.add((half, number))
                try:
                    why = trial(kernels)
                except Exception as error:
                    # Compilers fail in many ways, on GPUs that they do not know or whose memory is full.
                    why = f"{type(error).__name__}: {error}"
                if why is not None:
                    self._fall_back(half, ours, number, why)

    @property
    @override
    def needs_whole_updates(self) -> bool:
        return any(batch.update == "rms" for batch in self.plan.batches)

    # -- gradients to coefficients -------------------------------------------------------------------------------------

    @override
    def extract(self, intake: Intake) -> CompressedUpdate:
        if intake.step is not None:
            if self.needs_whole_updates:
                raise ValueError("a step of a fixed size needs the whole update first: merge it")
            if intake.quantize or intake.own is not None:
                raise ValueError("step needs values that leave the momentum at once: not with quantize or own")
        if not (self.defers and all(("extraction", n) in self._tried for n in self._extracts)):
            intake = intake.settled()
        usable = intake.usable
        flags = {n: k.flags([[g is not None for g in intake.grads]])[0] for n, k in self._extracts.items()}
        if usable is not None:
            flags = dict.fromkeys(flags, usable)
        self._try("extraction", self._extracts, lambda k: extraction_differs(k, intake, flags[k.number]))
        update = self.room(quantize=intake.quantize)
        spoken = self.extract_into(update, intake, flags)
        self._signs = intake.own is not None and self._whole(self._extracts)
        given = [grad is not None for grad in intake.grads]
        if usable is None:
            rest = self._without(self._extracts)
            by_torch = rest.extract_into(update, _without_step(intake))
            if intake.quantize:
                rest.silence(given, by_torch)
        # Values are said of all that are given.
        said = spoken if intake.quantize else {} if usable is None else flags
        update = DeferredUpdate(self.plan, update.index, update.value, tuple(given), said)
        if intake.step is not None:
            params, rates = intake.step
            self.merge([update], params, lr=rates)
        return update

    def room(self, *, quantize: bool) -> CompressedUpdate:
        """For an update of ours: what the kernels fill need not be filled before."""
        index, value = [], []
        for number, b in enumerate(self.plan.batches):
            make = torch.empty if number in self._extracts else torch.zeros
            index.append(make(b.tiles, b.k, dtype=torch.int32, device=b.device))
            value.append(make(b.tiles, b.k, dtype=torch.bool if quantize else b.value_dtype, device=b.device))
        return CompressedUpdate(self.plan, tuple(index), tuple(value), (False,) * len(self.plan))

    def extract_into(
        self,
        update: CompressedUpdate,
        intake: Intake,
        flags: dict[int, Tensor],
        *,
        precision: str = "split",
    ) -> dict[int, Tensor]:
        """The kernels' batches of an update; nothing waits for the device.

        Args:
            update: whose index and value are filled.
            intake: what is taken.
            flags: by batch ``(tensors,)`` int32, 0 for gradients that are left out.
            precision: of the transform.

        Returns:
            by batch ``(tensors,)`` int32, 1 where anything is said; it only means something for signs.
        """
        spoken: dict[int, Tensor] = {}
        zeros = {
            device: torch.zeros(len(self.plan), dtype=torch.int32, device=device)
            for device in dict.fromkeys(k.batch.device for k in self._extracts.values())
        }
        for number, kernels in self._extracts.items():
            batch = kernels.batch
            spoken[number] = zeros[batch.device]
            kernels.extract(
                kernels.of_one_type(intake.grads),
                intake.momenta,
                intake.own,
                as_coefficients=intake.in_coefficients[min(batch.ranges)],
                rate=intake.lr[batch.group],
                keep=intake.decay[batch.group],
                scale=intake.scale,
                present=flags[number],
                index=update.index[number],
                value=update.value[number],
                spoken=spoken[number],
                precision=precision,
            )
        return spoken

    @property
    @override
    def defers(self) -> bool:
        return self._looks and self._whole(self._extracts)

    @override
    def finite(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        device = self.plan.batches[0].device if self.plan.batches else None
        if not self._looks or any(grad is not None and grad.device != device for grad in grads):
            return None
        [first, *_] = self._extracts.values()
        flags = first.flags([[grad is not None for grad in grads]])[0].clone()
        try:
            for kernels in self._extracts.values():
                kernels.check(kernels.of_one_type(grads), flags)
        except Exception as error:
            # Nothing but flags was written to.
            self._looks = False
            warnings.warn(
                f"engine='triton': torch looks at the gradients from now on: {type(error).__name__}: {error}",
                UserWarning,
                stacklevel=2,
            )
            return None
        return flags

    def usable(self, grads: Sequence[Tensor | None]) -> dict[int, Tensor]:
        """By batch ``(tensors,)`` int32, 1 for gradients that are finite, found out without waiting for the device."""
        flags: dict[int, Tensor] = {}
        for number, kernels in self._extracts.items():
            flags[number] = kernels.flags([[grad is not None for grad in grads]])[0].clone()
            kernels.check(kernels.of_one_type(grads), flags[number])
        return flags

    # -- coefficients to weights ---------------------------------------------------------------------------------------

    @override
    def merge(
        self,
        updates: Sequence[CompressedUpdate],
        params: Sequence[Tensor],
        *,
        lr: Sequence[float],
        sizes: Sizes | None = None,
    ) -> None:
        if not updates:
            return
        self._check_number(updates)
        if not self._can_merge(updates):
            self._without({}).merge(updates, params, lr=lr, sizes=sizes)
            return
        weights = Contiguous(params)
        flags = self._said_by(updates)
        self._try_merge(updates, flags, weights.tensors, lr)
        self._without(self._merges).merge(updates, weights.tensors, lr=lr, sizes=sizes)
        self.merge_into(updates, flags, weights.tensors, lr)
        weights.write_back()
        for kernels in self._merges.values():
            _count_writes([weights.tensors[n] for n in kernels.batch.ranges])

    @override
    def largest(self, updates: Sequence[CompressedUpdate]) -> dict[int, float]:
        return self._without(self._merges).largest(updates)

    @override
    def squares(self, updates: Sequence[CompressedUpdate], largest: Mapping[int, float]) -> dict[int, float | int]:
        return self._without(self._merges).squares(updates, largest)

    @property
    @override
    def merges_ahead(self) -> bool:
        return self._whole(self._merges) and self._whole(self._extracts)

    @override
    def merge_ahead(
        self,
        updates: Sequence[CompressedUpdate],
        weights: Sequence[Tensor],
        shifted: Sequence[Tensor | None],
        *,
        lr: Sequence[float],
        ahead_lr: Sequence[float],
    ) -> bool:
        written = [weights[n] for k in self._merges.values() for n in k.batch.ranges]
        written += [ahead for k in self._merges.values() for n in k.batch.ranges if (ahead := shifted[n]) is not None]
        if not (updates and self.merges_ahead and self._signs and all(tensor.is_contiguous() for tensor in written)):
            return False
        self._check_number(updates)
        if not self._can_merge(updates):
            return False
        flags = self._said_by(updates)
        self._try_merge(updates, flags, weights, lr)
        if not self._whole(self._merges):
            return False
        self.merge_into(updates, flags, weights, lr, ahead=Ahead(shifted, ahead_lr))
        _count_writes(written)
        return True

    def _check_number(self, updates: Sequence[CompressedUpdate]) -> None:
        if len(updates) > MAX_CONTRIBUTORS and self.plan.arithmetic == "exact":
            raise ConfigurationError(
                f"{len(updates)} updates in one step: arithmetic='exact' is proven for at most {MAX_CONTRIBUTORS}",
                name="updates",
                value=len(updates),
            )

    def _said_by(self, updates: Sequence[CompressedUpdate]) -> dict[int, Tensor]:
        """By batch ``(contributors, tensors)`` int32: who says anything of a tensor."""
        if not any(isinstance(update, DeferredUpdate) for update in updates):
            return {n: k.flags([u.present for u in updates]) for n, k in self._merges.items()}
        flags = {}
        for n, kernels in self._merges.items():
            rows = [
                update.flags[n]
                if isinstance(update, DeferredUpdate) and n in update.flags
                else kernels.flags([update.present])[0]
                for update in updates
            ]
            flags[n] = torch.stack(rows) if len(rows) > 1 else rows[0][None]
        return flags

    def _try_merge(
        self,
        updates: Sequence[CompressedUpdate],
        flags: dict[int, Tensor],
        weights: Sequence[Tensor],
        lr: Sequence[float],
    ) -> None:
        self._try(
            "merge",
            self._merges,
            lambda k: merge_differs(k, updates, flags[k.number], weights, lr[k.batch.group] * k.batch.gain),
        )

    def _can_merge(self, updates: Sequence[CompressedUpdate]) -> bool:
        """Whether the kernels read them: some may send signs and others values, or values of another type."""
        for number, kernels in self._merges.items():
            shape = (kernels.batch.tiles, kernels.batch.k)
            kinds = {u.value[number].dtype for u in updates}
            if len(kinds) > 1 or not kinds <= {torch.bool, *SHIFTED}:
                return False
            for u in updates:
                parts = (u.index[number], u.value[number])
                if u.index[number].dtype != torch.int32 or not all(
                    p.shape == shape and p.is_contiguous() and p.device == kernels.batch.device for p in parts
                ):
                    return False
        return True

    def merge_into(
        self,
        updates: Sequence[CompressedUpdate],
        flags: dict[int, Tensor],
        weights: Sequence[Tensor],
        lr: Sequence[float],
        *,
        ahead: Ahead | None = None,
    ) -> None:
        """The kernels' batches of a merge, and the lookahead of the next step on the way. Nothing waits for the device.

        Args:
            updates: of all contributors.
            flags: by batch ``(contributors, tensors)`` int32: who says anything of a tensor.
            weights: of the model, contiguous; changed in place.
            lr: per parameter group.
            ahead: by the momentum that :meth:`extract_into` left last, with ``own``.
        """
        for number, kernels in self._merges.items():
            batch = kernels.batch
            kernels.merge(updates, flags[number], weights, lr[batch.group] * batch.gain, ahead=ahead)

    @override
    def decode(self, updates: Sequence[CompressedUpdate], *, sizes: Sizes | None = None) -> list[Tensor]:
        return self._without({}).decode(updates, sizes=sizes)

    # -- the lookahead -------------------------------------------------------------------------------------------------

    @override
    def shift(
        self,
        params: Sequence[Tensor],
        directions: Sequence[Tensor],
        saved: Sequence[Tensor],
        lr: Sequence[float],
        whole: Sequence[bool],
    ) -> None:
        chosen = [n for n, as_it_is in enumerate(whole) if not as_it_is and directions[n].dtype == torch.float32]
        kinds, others = self._lists.kinds(params, saved, chosen, directions)
        for (device, dtype), numbers in kinds.items():
            tensors, runs = self._lists.tables([(params[n], directions[n], saved[n]) for n in numbers])
            rates = self._lists.rates([lr[n] for n in numbers], device)
            launching.shift(tensors, runs, rates, dtype, torch.float32)
            _count_writes([tensor for n in numbers for tensor in (params[n], saved[n])])
        if others:
            args = ([each[n] for n in others] for each in (params, directions, saved, lr, whole))
            self._without({}).shift(*args)  # type: ignore[arg-type]

    @override
    def put_back(self, params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        kinds, others = self._lists.kinds(params, saved, range(len(params)))
        for (_, dtype), numbers in kinds.items():
            tensors, runs = self._lists.tables([(params[n], params[n], saved[n]) for n in numbers])
            launching.put_back(tensors, runs, dtype)
            _count_writes([params[n] for n in numbers])
        if others:
            super().put_back([params[n] for n in others], [saved[n] for n in others])


def _without_step(intake: Intake) -> Intake:
    return intake if intake.step is None else Intake(
        intake.grads, intake.momenta, intake.in_coefficients, intake.lr, intake.decay, intake.quantize, intake.own
    )  # fmt: skip


def _count_writes(tensors: Sequence[Tensor]) -> None:
    """As after any change in place: autograd refuses to go back through what they were before."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
