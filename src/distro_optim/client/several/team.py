"""A client of several processes, as the first of them sees it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import override

from ...comm.model_exchange import SharedModel
from ...coordinator.model import LLM, OptimizerDefinition
from ...errors import ModelConfigError, ModelWeightsError, ProtocolError
from ...models.accumulation import Fp32GradientAccumulator
from ...models.batches import TokenBatch
from ...models.building import build_shapes, sorted_parameters, tied_sources
from ...models.causal_lm import CausalLM
from ...models.config import LanguageModelConfig, read_config
from ...models.memory import check_memory, share_of
from ...models.sharding import DATA, TENSOR, build_in_shards, check_sharding
from ...models.weights import FolderTensors, GivenTensors, TensorSource, compare_weights
from ...strategy.forwarding import AccessParts, ForwardingActions
from ...strategy.port import RunAccess, RunActions, TrainerAction
from ...strategy.ranks.holders import ShardHolders
from ...strategy.ranks.local_ranks import LocalRanks
from ...strategy.sample_order import micro_batches
from ..options import JoinOptions
from .processes import started

__all__ = ["MakeModel", "Member", "ShardTrainers", "Team", "Train"]

_TOKENIZER: Final = "tokenizer.json"


@dataclass(frozen=True)
class MakeModel:
    """The first process tells the others: make your part of this model, and take the values that I give."""

    config: LanguageModelConfig


@dataclass(frozen=True)
class Train:
    """The first process tells the others: go through the run with me.

    Attributes:
        optimizer, lr: of the run, and the rate with which the optimizer is made.
        session: settings of the session.
        micro_batch_size: sequences of a forward pass.
    """

    optimizer: OptimizerDefinition
    lr: float
    session: dict[str, Any]
    micro_batch_size: int


class Member:
    """One of the processes.

    Args:
        number: of them.
        shape: of the mesh: processes with different samples, and those that compute each together.
        device: of this one.

    Attributes:
        ranks: all of them.
        mesh: likewise.
    """

    def __init__(self, number: int, shape: tuple[int, int], device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self.ranks = LocalRanks()
        self.mesh: DeviceMesh = init_device_mesh(device.type, shape, mesh_dim_names=(DATA, TENSOR))

    def empty_model(self, config: LanguageModelConfig) -> CausalLM:
        """This process's part of the model. All must call."""
        return build_in_shards(config, self.mesh, self.device)

    def fill(self, model: CausalLM, read: Callable[[str], Tensor] | None) -> None:
        """Gives the model its values, which the first process reads by their names. All must call.

        Raises what ``read`` raises, in all of them.
        """
        holders = ShardHolders(self.ranks)
        for name, tensor in model.tensors().items():

            def ask(name: str = name, tensor: Tensor = tensor) -> dict[str, Tensor]:
                return {} if read is None else {name: read(name).to(tensor.dtype)}

            holders.fill(tensor, holders.read(ask)[name])


class Team(Member):
    """The first process, which has the others. See :func:`Team.started`."""

    @classmethod
    @contextmanager
    def started(cls, options: JoinOptions, devices: list[torch.device], follow: Callable[..., None]) -> Iterator[Self]:
        """With the other processes, one for each of ``devices`` but the first, until the end of the block.

        Args:
            follow: what they do: :func:`.member.follow`.

        Raises:
            MissingDependencyError: PyTorch has no FSDP2.
        """
        check_sharding(tensor=options.tensor_parallelism)
        shape = (options.data_parallelism, options.tensor_parallelism)
        with started(len(devices), functools.partial(follow, shape=shape, devices=devices)):
            yield cls(0, shape, devices[0])

    @property
    def count(self) -> int:
        """How many processes there are."""
        return self.ranks.size

    def make(self, run: LLM, where: SharedModel | str | Path) -> CausalLM:
        """The run's model in shards, of which no process has more than one whole tensor at a time.

        Raises:
            ModelConfigError, ModelWeightsError, ModelTooLargeError, ProtocolError: as :meth:`.CausalLM.from_run`.
            ConfigurationError: this model cannot be cut in this way.
        """
        if not isinstance(where, SharedModel):
            path = Path(where)
            model = self._make(read_config(path, run.architecture, max_seq_len=run.max_seq_len), FolderTensors(path))
            model.read_companions(path)
            return model
        try:
            if not where.config.lstrip().startswith("{"):
                raise ModelConfigError("config.json is not a JSON object", name="config")
            config = read_config(where.config, run.architecture, max_seq_len=run.max_seq_len, from_peer=True)
            model = self._make(config, GivenTensors(where.parameters))
        except (ModelConfigError, ModelWeightsError) as error:
            raise ProtocolError(f"the peers' model cannot be used: {error}") from error
        if where.tokenizer:
            model.companions[_TOKENIZER] = where.tokenizer.encode()
        return model

    def _make(self, config: LanguageModelConfig, source: TensorSource) -> CausalLM:
        check_sharding(tensor=self.mesh[TENSOR].size(), config=config)
        shapes = build_shapes(config)
        check_memory(share_of(sorted_parameters(shapes).values(), self.count), self.device, buffers=shapes.buffers())
        targets = CausalLM.around(config, shapes).tensors()
        origin = compare_weights(targets, source, stand_ins=tied_sources(shapes, config))
        if source.strict:  # from peers: all of it is looked at before the others wait for it
            for name in origin.values():
                source.read(name)
        self.ranks.share(lambda: MakeModel(config))
        model = self.empty_model(config)
        self.fill(model, lambda name: source.read(origin[name]))
        return model

    def train(self, orders: Train) -> None:
        """Tells the others to go through the run from here on."""
        self.ranks.share(lambda: orders)

    def leaving_together(self, access: RunAccess, wants_to_leave: Callable[[], bool]) -> RunAccess:
        """The access for the session: when we are told to leave, all processes learn of it at the same place.

        Args:
            wants_to_leave: whether Ctrl-C was pressed.
        """
        return AccessParts.of(access, actions=_LeavingActions(access.actions, wants_to_leave))


class _LeavingActions(ForwardingActions):
    def __init__(self, inner: RunActions, wants_to_leave: Callable[[], bool]) -> None:
        super().__init__(inner)
        self._wants_to_leave = wants_to_leave

    @override
    def next_action(self, timeout: float | None = None) -> TrainerAction | None:
        self._look()
        return super().next_action(timeout)

    @override
    def is_cancelled(self, step: int) -> bool:
        self._look()
        return super().is_cancelled(step)

    def _look(self) -> None:
        if self._wants_to_leave():
            raise KeyboardInterrupt


class ShardTrainers:
    """Trains a batch on all processes: each a part of its samples, and those of a line of the mesh together.

    Args:
        model: in shards.
        member: this process.
        micro_batch_size: sequences of a forward pass.
    """

    def __init__(self, model: CausalLM, member: Member, *, micro_batch_size: int) -> None:
        self._model = model
        self._member = member
        self._micro_batch_size = micro_batch_size
        self._accumulator = Fp32GradientAccumulator(model.parameters())

    def read(self, ask: Callable[[], TokenBatch] | None) -> TokenBatch:
        """A batch that the first process reads; None on the others. Raises what it raises there."""
        return self._member.ranks.share(ask)

    def train(self, batch: TokenBatch, cancelled: Callable[[], bool]) -> float | None:
        """Forward and backward passes; the gradients are in the model afterwards. All processes must call.

        Returns:
            the loss, the mean over the samples; None if cancelled.
        """
        mesh = self._member.mesh
        data = mesh[DATA].size()
        pieces = micro_batches(
            range(len(batch)), self._micro_batch_size, rank=mesh.get_local_rank(DATA), world_size=data
        )
        self._accumulator.clear()
        total = 0.0
        for piece in pieces:
            if cancelled():
                self._accumulator.clear()
                return None
            loss = self._model(_rows(batch, piece.samples).to(self._member.device)).loss
            (loss * piece.weight).backward()
            total += float(loss.detach()) * piece.weight
            if len(pieces) > 1:
                self._accumulator.add()
        if len(pieces) > 1:
            self._accumulator.apply()
        return sum(self._member.ranks.collect(total)) / self._member.ranks.size


def _rows(batch: TokenBatch, numbers: tuple[int, ...]) -> TokenBatch:
    rows = torch.tensor(numbers, device="cpu")
    lengths = batch.sequence_lengths
    return TokenBatch(
        batch.input_ids[rows],
        None if batch.labels is None else batch.labels[rows],
        None if batch.position_ids is None else batch.position_ids[rows],
        None if lengths is None else tuple(lengths[number] for number in numbers),
    )
