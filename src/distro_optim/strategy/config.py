"""The settings of a run that one hosts, and the coordinator's state that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Final, Literal

from ..coordinator.model import (
    LLM,
    ConstantLR,
    Distro,
    DummyData,
    DummyOptimizer,
    Hub,
    LearningRateSchedule,
    LLMArchitecture,
    LLMTrainingDataType,
    OptimizerDefinition,
)
from ..coordinator.rules.checkpoints import hub_of_peers
from ..coordinator.rules.outlook import USUAL_WAIT_SECONDS
from ..coordinator.rules.steps import DRAIN_ROUNDS
from ..coordinator.types import (
    MAX_NUM_CLIENTS,
    MAX_NUM_WITNESSES,
    RUN_ID_MAX_LEN,
    Coordinator,
    CoordinatorConfig,
    CoordinatorProgress,
    RunState,
)
from ..coordinator.watchers import watcher_keys
from ..errors import ConfigurationError
from .one_line import tell_mistakes_in_one_line

__all__ = ["RunConfig"]

_MAX_U8: Final = (1 << 8) - 1
_MAX_U16: Final = (1 << 16) - 1
_MAX_U32: Final = (1 << 32) - 1
_MAX_U64: Final = (1 << 64) - 1

_MAX_SUCCESSION_AFTER: Final = 3600

_STEPS_AFTER_TRAINING: Final = 1 + DRAIN_ROUNDS
"""From the last step that is trained to the coordinator's ``total_steps``, which is the first that has no round."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run that is hosted here goes. The defaults are for a few friends whose rounds take seconds.

    Attributes:
        run_id: its name, at most 32 bytes; None draws one.
        total_steps: the last step that is trained, counted from 1: a run of one epoch trains so many rounds. Then come
            two rounds that apply the last results. So do they at the end of each epoch before, and count as steps.
            With a ``round_witness_time`` it is Psyche's number: the step with which the run stops, not trained any
            more, and the results of the two steps before it are never applied. None takes what the training script
            says.
        global_batch_size: samples of a round, all peers together; None takes what the training script says.
        min_peers: how many it takes to begin an epoch. 1 begins alone.
        keep_peers: how many it takes to go on with it; None is ``min_peers``.
        peers_to_start: how many it takes to begin the first epoch, so that friends begin together; None is
            ``min_peers``.
        witness_nodes: how many report on a round; 0 asks everybody, up to 32. Must not be above ``keep_peers``.
        warmup_time: seconds that joiners have to load the model; over as soon as everybody is ready.
        cooldown_time: seconds between two epochs.
        epoch_time: seconds of an epoch at most.
        joiner_wait_time: an epoch is brought to its end after this many seconds if somebody waits for the next one,
            and at once if it has lost a third of its peers; None never does that.
        max_round_train_time: seconds after which a round goes on without those that have not finished.
        round_witness_time: seconds for the reports after a round. They are in when it ends in good order, so 0.
        waiting_for_members_extra_time: least seconds of waiting before an epoch.
        lr_schedule: the run's learning rates, for peers that follow them; None takes the optimizer's at the start.
        optimizer: what the run optimizes with; None takes what the training script says.
        cold_start_warmup_steps: steps over which the learning rate rises again after a pause.
        max_seq_len: tokens of a sample, where samples are sequences.
        start_step: where the run begins; above 1 if the weights were trained before.
        start_data_index: first sample of that step.
        trust: ``"host"``: while the host trains, its weights are right, whatever the others report, since anybody may
            have come; ``"peers"``: those of most peers that have trained are, and a host whose weights differ takes
            theirs.
        audit_fraction: share of the results of each round that peers audit, 0 to 1, such as 0.02: three others compute
            the gradient of the same batch and say whether the result agrees with it. Who fails is taken out of the run.
            It takes three peers at least; 0 audits nobody.
        audit_momentum: in a run with audits, peers commit to their momentum in each round, too, and show parts of it
            when they are drawn, which finds what the results alone do not tell (half of a batch, no lookahead). That
            needs memory for three momenta. False compares results with gradients alone.
        observers: public keys, at most 8, of those that may look at the run without being in it, by ``distro-optim
            verify TICKET``: they get its model and results, audit them, and are not heard. Peers learn of them when
            they join.
        succession: whether the run goes on when its host is gone: more than half of those who train elect another one.
        succession_after: seconds for which the host may be silent until then.
        save_dir: folder in which the run's state is kept; None keeps nothing.
        resume: go on from what is saved there, with the settings given now; starts from the beginning if nothing is.

    Raises:
        ConfigurationError: a value cannot work; names it and says what can.
    """

    run_id: str | None = None
    total_steps: int | None = None
    global_batch_size: int | None = None
    min_peers: int = 1
    keep_peers: int | None = None
    peers_to_start: int | None = None
    witness_nodes: int = 0
    warmup_time: int = 120
    cooldown_time: int = 1
    epoch_time: int = 600
    joiner_wait_time: int | None = USUAL_WAIT_SECONDS
    max_round_train_time: int = 60
    round_witness_time: int = 0
    waiting_for_members_extra_time: int = 1
    lr_schedule: LearningRateSchedule | None = None
    optimizer: Distro | None = None
    cold_start_warmup_steps: int = 0
    max_seq_len: int = 1
    start_step: int = 1
    start_data_index: int = 0
    trust: Literal["host", "peers"] = "host"
    audit_fraction: float = 0.0
    audit_momentum: bool = True
    observers: Sequence[bytes | str] = ()
    succession: bool = True
    succession_after: float = 15.0
    save_dir: str | PathLike[str] | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        try:
            self._check()
        except ConfigurationError:
            tell_mistakes_in_one_line()  # a script makes its settings before its strategy, which says so, too
            raise

    def _check(self) -> None:
        _within("total_steps", self.total_steps, 1, _MAX_U32 - _STEPS_AFTER_TRAINING)
        _within("global_batch_size", self.global_batch_size, 1, _MAX_U16)
        _within("min_peers", self.min_peers, 1, MAX_NUM_CLIENTS)
        _within("keep_peers", self.keep_peers, 1, self.min_peers)
        _within("peers_to_start", self.peers_to_start, self.min_peers, MAX_NUM_CLIENTS)
        _within("witness_nodes", self.witness_nodes, 0, MAX_NUM_WITNESSES)
        _within("warmup_time", self.warmup_time, 1, _MAX_U32)
        _within("cooldown_time", self.cooldown_time, 1, _MAX_U32)
        _within("epoch_time", self.epoch_time, 2, _MAX_U32)
        _within("joiner_wait_time", self.joiner_wait_time, 1, _MAX_U32)
        _within("max_round_train_time", self.max_round_train_time, 1, _MAX_U32)
        _within("round_witness_time", self.round_witness_time, 0, _MAX_U32)
        _within("waiting_for_members_extra_time", self.waiting_for_members_extra_time, 1, _MAX_U8)
        _within("cold_start_warmup_steps", self.cold_start_warmup_steps, 0, _MAX_U32)
        _within("max_seq_len", self.max_seq_len, 1, _MAX_U32)
        _within("start_step", self.start_step, 1, _MAX_U32)
        _within("start_data_index", self.start_data_index, 0, _MAX_U64)
        if self.run_id is not None and not 0 < len(self.run_id.encode()) <= RUN_ID_MAX_LEN:
            raise ConfigurationError(
                f"run_id has 1 to {RUN_ID_MAX_LEN} bytes, got {self.run_id!r}", name="run_id", value=self.run_id
            )
        if self.run_id is not None and "/" in self.run_id:
            raise ConfigurationError(
                f"run_id is {self.run_id!r}, but a slash would end the address in host:port/run-id",
                name="run_id",
                value=self.run_id,
            )
        if self.witness_nodes > self._kept:
            raise ConfigurationError(
                f"witness_nodes is {self.witness_nodes}, but only {self._kept} peers are sure to stay in an epoch; "
                "0 asks everybody",
                name="witness_nodes",
                value=self.witness_nodes,
            )
        for name in ("warmup_time", "max_round_train_time"):
            if getattr(self, name) >= self.epoch_time:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)} s, but an epoch lasts {self.epoch_time} s: raise epoch_time",
                    name=name,
                    value=getattr(self, name),
                )
        if self.trust not in ("host", "peers"):
            raise ConfigurationError(
                f'trust must be "host" or "peers", got {self.trust!r}', name="trust", value=self.trust
            )
        fraction = self.audit_fraction
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            raise ConfigurationError(
                f"audit_fraction is the share of results that are audited, a number from 0 to 1, got {fraction!r}",
                name="audit_fraction",
                value=fraction,
            )
        watcher_keys(self.observers)
        if not 1 <= self.succession_after <= _MAX_SUCCESSION_AFTER:
            raise ConfigurationError(
                f"succession_after is 1 to {_MAX_SUCCESSION_AFTER} seconds, got {self.succession_after!r}",
                name="succession_after",
                value=self.succession_after,
            )
        if self.resume and self.save_dir is None:
            raise ConfigurationError(
                "resume needs the folder to resume from: set save_dir", name="resume", value=self.resume
            )

    @property
    def _kept(self) -> int:
        return self.min_peers if self.keep_peers is None else self.keep_peers

    def training_up_to(self, step: int) -> RunConfig:
        """The same with ``step``, counted from 1, as the last one to be trained."""
        return replace(self, total_steps=step if self._is_prompt else step + 1)

    @property
    def last_step(self) -> int | None:
        """The last step that is trained, counted from 1; None if ``total_steps`` is open."""
        if self.total_steps is None or self._is_prompt:
            return self.total_steps
        return self.total_steps - 1

    @property
    def _is_prompt(self) -> bool:
        return self.round_witness_time == 0

    def coordinator_state(self, run_id: str) -> Coordinator:
        """The state with which a coordinator begins the run.

        Args:
            run_id: the run's name, where :attr:`run_id` is None.

        Raises:
            ConfigurationError: ``total_steps`` or ``global_batch_size`` is not set.
        """
        total_steps = _required("total_steps", self.total_steps)
        batch_size = _required("global_batch_size", self.global_batch_size)
        optimizer: OptimizerDefinition = self.optimizer if self.optimizer is not None else DummyOptimizer()
        return Coordinator(
            run_id=self.run_id or run_id,
            run_state=RunState.WAITING_FOR_MEMBERS,
            model=LLM(
                max_seq_len=self.max_seq_len,
                cold_start_warmup_steps=self.cold_start_warmup_steps,
                architecture=LLMArchitecture.HF_AUTO,
                checkpoint=Hub(
                    hub_of_peers(
                        trust_peers=self.trust == "peers",
                        audit_fraction=float(self.audit_fraction),
                        audit_momentum=self.audit_momentum,
                    )
                ),
                data_type=LLMTrainingDataType.PRETRAINING,
                data_location=DummyData(),
                lr_schedule=self.lr_schedule or ConstantLR(base_lr=1e-3, warmup_init_lr=0.0, warmup_steps=0),
                optimizer=optimizer,
            ),
            config=CoordinatorConfig(
                warmup_time=self.warmup_time,
                cooldown_time=self.cooldown_time,
                max_round_train_time=self.max_round_train_time,
                round_witness_time=self.round_witness_time,
                global_batch_size_warmup_tokens=0,
                epoch_time=self.epoch_time,
                total_steps=total_steps + (_STEPS_AFTER_TRAINING if self._is_prompt else 0),
                init_min_clients=self.min_peers,
                min_clients=self._kept,
                witness_nodes=self.witness_nodes,
                global_batch_size_start=batch_size,
                global_batch_size_end=batch_size,
                verification_percent=0,
                waiting_for_members_extra_time=self.waiting_for_members_extra_time,
            ),
            progress=CoordinatorProgress(step=self.start_step, epoch_start_data_index=self.start_data_index),
        )


def _within(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
        raise ConfigurationError(
            f"{name} must be a whole number from {low} to {high}, got {value!r}", name=name, value=value
        )


def _required(name: str, value: int | None) -> int:
    if value is None:
        raise ConfigurationError(f"a run needs {name}: set it in the RunConfig", name=name, value=None)
    return value
