"""Saving, loading and copying: an optimizer that goes on bit for bit, with what was on its way."""

from __future__ import annotations

import warnings
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from ..compress import CompressedUpdate
from ..errors import ConfigurationError
from .lookahead import Edits, Lookahead
from .momentum import DecoupledMomentum
from .rules import PUBLISHED, RULES
from .run import ARITHMETIC, Run, Seen
from .state import COEFFICIENTS, DELTA, MOMENTUM_BUFFER, WEIGHT, pack_in_flight, unpack_in_flight

__all__ = ["ResumableOptimizer"]

_SETTINGS: Final = ("_tiling", "_transform", "_arithmetic", "_quantize", "_overlap")
"""Attributes that a copy has too."""


class ResumableOptimizer(DecoupledMomentum):
    """``state_dict``, ``load_state_dict``, ``copy`` and ``pickle``, as for any optimizer."""

    @override
    @torch.inference_mode(False)
    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As for any optimizer, and what is on its way. Loading it continues bit for bit.

        Of DTensors it is the state of the model that is not sharded, in main memory, on every rank.

        Every peer's is different: ``delta`` is its own. Weights saved beside it need no :meth:`eval` first, since
        the true ones are in here while the lookahead is on; weights saved for others do.
        """
        self._run.settle()
        self._ready_engine()
        self._settle_quarantine()
        packed: dict[str, Any] = super().state_dict()
        sharding = self._sharding
        if sharding is not None:
            packed["state"] = {n: sharding.whole_state(n, entry) for n, entry in packed["state"].items()}
        if self._overlap:
            plan = self.plan
            updates = None
            if self._run.arrived is not None:
                updates = [self._on_current_plan(u) for u in self._run.arrived]
            extra = pack_in_flight(plan, updates, self._quantize, self._run.num_peers)
            packed["state"] = {n: {**entry, **extra[n]} for n, entry in packed["state"].items()}
        return packed

    @override
    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the saved optimizer stood. Replaces the weights if it was looking ahead.

        Of another optimizer's state, such as AdamW's, the settings count that both have, and the momentum starts from
        zero; a warning says so.

        Raises:
            ConfigurationError: the state belongs to parameters of other shapes, or to another arithmetic.
        """
        self._run.settle()
        self._settle_quarantine()
        self._run.seen_whole = Seen()
        ahead = self._run.lookahead.on
        # What was written to the weights is the checkpoint of the model, so nothing of them is taken back.
        self._undo_lookahead(Edits.KEEP)
        before = self.state, self.param_groups
        try:
            originals = self._load_base(state_dict)
            for group in self.param_groups:
                if group[ARITHMETIC] != self._arithmetic:
                    raise ConfigurationError(
                        f"the saved state was made with arithmetic={group[ARITHMETIC]!r}, this optimizer has "
                        f"{self._arithmetic!r}: make it with the same one, as all its peers",
                        name="state_dict",
                        value=group[ARITHMETIC],
                    )
            for group, own in zip(self.param_groups, before[1], strict=True):
                for name in RULES:
                    if group[name] != own[name]:
                        raise ConfigurationError(
                            f"the saved state was made with {name}={group[name]!r}, this optimizer has {own[name]!r}: "
                            "make it with the same one, as all its peers",
                            name="state_dict",
                            value=group[name],
                        )
            self._run.forget_plan()
            plan = self.plan
            for number, (param, original) in enumerate(zip(self._params(), originals, strict=True)):
                # Copies: the saved tensors may be those of an optimizer that goes on.
                copied = {key: value.clone() for key, value in original.items() if isinstance(value, Tensor)}
                self.state[param] = self._restored(copied, number, param)
            in_flight = self._overlap and self.param_groups[0]["in_flight"]
            arrived = unpack_in_flight(plan, originals) if in_flight else None
        except BaseException:
            self.state, self.param_groups = before
            self._run.forget_plan()
            if ahead:
                self._look_ahead_again()
            raise
        _warn_of_another_optimizer(state_dict)
        self._run.arrived, self._run.started_with = arrived, None
        self._flag_in_flight(arrived is not None)
        if self.param_groups[0]["looks_ahead"]:
            for param, original in zip(self._held(), originals, strict=True):
                if WEIGHT in original:
                    param.copy_(original[WEIGHT])
            if self._overlap:
                self._look_ahead_again()
        if not self._overlap:
            for group in self.param_groups:
                group["looks_ahead"] = group["resumes_ahead"] = False

    @torch.no_grad()
    def momenta_of(self, number: int) -> dict[str, Tensor]:
        """The momentum of a parameter, and Muon's where it has one, by their keys in its state.

        Of a DTensor whole, as in :meth:`state_dict`; otherwise they are the very tensors.
        """
        self._ready_engine()
        state = self.state[self._params()[number]]
        found = {key: state[key] for key in (DELTA, COEFFICIENTS, MOMENTUM_BUFFER) if key in state}
        return found if self._sharding is None else self._sharding.whole_state(number, found)

    @torch.no_grad()
    def load_momenta(self, number: int, saved: dict[str, Tensor]) -> None:
        """What :meth:`momenta_of` gave, or some of it, into the state of a parameter of the same shape."""
        self._ready_engine()
        state = self.state[self._params()[number]]
        for key, value in (saved if self._sharding is None else self._sharding.part_of_state(number, saved)).items():
            state[key].copy_(value)

    def _load_base(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """Loads as the base class does, and returns each parameter's saved state as it was saved.

        The base class casts every tensor to the dtype of its parameter, and ``delta`` would lose its lower bits.
        """
        seen: dict[str, Any] = {}
        before = self.param_groups

        def complete_and_keep(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            # A state that says nothing of rules is of a version that had none, or of another optimizer.
            own = [{key: group[key] for key in (*RULES, "compression_decay", "ahead")} for group in self.param_groups]
            own += [{}] * (len(loaded["param_groups"]) - len(own))
            groups = [
                {**self.defaults, **kept, **(PUBLISHED if "compression_decay" in group else {}), **group}
                for kept, group in zip(own, loaded["param_groups"], strict=False)
            ]
            seen.update(loaded, param_groups=groups)
            sharding = self._sharding
            if sharding is not None and [len(g["params"]) for g in groups] == [len(g["params"]) for g in before]:
                numbers = {n: place for place, n in enumerate(n for group in groups for n in group["params"])}
                seen["state"] = {n: sharding.part_of_state(numbers[n], e) for n, e in seen["state"].items()}
            return seen

        # The last of the hooks: what the user's own make of the state is what counts.
        hook = self.register_load_state_dict_pre_hook(complete_and_keep)
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            saved, own = ([len(group["params"]) for group in groups] for groups in (seen["param_groups"], before))
            if saved == own:
                raise
            raise ConfigurationError(
                f"{error}: the groups that are saved have {_counted(saved)} parameters, those of this optimizer "
                f"{_counted(own)}. Make the same groups, or load the weights alone, and the momentum starts from zero",
                name="state_dict",
                value=saved,
            ) from None
        finally:
            hook.remove()
        return [dict(seen["state"].get(n, {})) for group in seen["param_groups"] for n in group["params"]]

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._run.settle()
        self._settle_quarantine()
        state: dict[str, Any] = super().__getstate__()
        state.update(
            {
                key: getattr(self, key)
                for key in ("_tiling", "_transform", "_arithmetic", "_quantize", "_overlap", "_engine")
            }
        )
        # Neither exchange nor process group: two optimizers that publish on one of them would mix up their steps.
        run = self._run
        explicit = run.explicit_exchange or run.process_group is not None
        state["_run"] = Run(explicit_exchange=explicit, arrived=run.arrived)
        return state

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_run" in state:  # a copy or an unpickled optimizer, not load_state_dict
            self._run.lookahead = Lookahead(on=bool(self.param_groups and self.param_groups[0]["looks_ahead"]))

    def _flag_in_flight(self, flag: bool) -> None:
        for group in self.param_groups:
            group["in_flight"] = flag

    def _on_current_plan(self, update: CompressedUpdate) -> CompressedUpdate:
        """An update from before ``add_param_group``, with nothing said about the new parameters."""
        plan = self.plan
        if update.plan.layout == plan.layout:
            return update
        entries = update.tensors()
        return CompressedUpdate.from_tensors(
            plan, entries + CompressedUpdate.empty(plan, quantized=self._quantize).tensors()[len(entries) :]
        )


def _counted(sizes: list[int]) -> str:
    return " and ".join(map(str, sizes))


def _warn_of_another_optimizer(state_dict: dict[str, Any]) -> None:
    """Warns where a state that was loaded has nothing of ours in it, neither settings nor momentum."""
    groups, entries = state_dict["param_groups"], state_dict["state"].values()
    if any("compression_decay" in group for group in groups) or any(
        DELTA in entry or COEFFICIENTS in entry for entry in entries
    ):
        return
    kept = sorted({f"{name}={group[name]}" for group in groups for name in ("lr", "weight_decay") if name in group})
    warnings.warn(
        "distro_optim: the loaded state is another optimizer's, so the momentum starts from zero"
        + (f", with the {', '.join(kept)} that is saved there" if kept else "")
        + ". Other values are set in optimizer.param_groups after loading.",
        UserWarning,
        stacklevel=3,
    )
