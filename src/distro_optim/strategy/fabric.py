"""FabricPsycheStrategy: a loop of one's own, with Fabric, hosts a run or joins one.

::

    strategy = FabricPsycheStrategy()  # or FabricPsycheStrategy(run="psyche1...")
    fabric = Fabric(strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(model, DisTrO(model.parameters(), lr=1e-3))
    for round in strategy.rounds(DataLoader(data, batch_size=32), max_steps=1000):
        for batch in round:
            fabric.backward(loss_of(model, batch))
        optimizer.step()

Rounds take the place of batches: which samples a peer trains, and how many, is for the run to say, so a round may be
several batches. Gradients of all of them are added up with the weights that make their mean loss that of the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.types import Optimizable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from ..errors import ConfigurationError, DistroError
from ..optim.sharding import is_sharded
from ..optimizer import DisTrO
from .config import RunConfig
from .frameworks.first_sample import look_at_first_sample
from .frameworks.framework_session import Ended, FrameworkSession, check_for_ddp, split_options
from .frameworks.hosting_defaults import complete_config, default_batch_size, rounds_per_pass
from .frameworks.lightning_checks import check_optimizers
from .frameworks.one_device import OneDevice
from .frameworks.round_loader import RoundBatch, RoundLoader
from .frameworks.samples import Samples, samples_of
from .frameworks.shards import ShardSizes, check_in_shards, load_whole, whole_state
from .network.on_solana import check_run
from .one_line import tell_mistakes_in_one_line
from .options import STRATEGY_DEFAULTS, StrategyOptions, TrainingOptions, shows
from .port import RunView
from .ranks.local_ranks import LocalRanks
from .round import Round

__all__ = ["FabricPsycheStrategy", "FabricRound", "FabricRounds"]


class FabricRound:
    """The batches of a round, on the device. While it is open, the weights look ahead.

    Attributes:
        step: of the run.
    """

    def __init__(self, round_: Round, batch: Any, strategy: FabricPsycheStrategy) -> None:
        self.step = round_.step
        self._round = round_
        self._batch = batch
        self._strategy = strategy

    @property
    def samples(self) -> list[int]:
        """Indices into the dataset of the samples that this peer trains; see :attr:`.Round.indices`."""
        return self._round.indices

    @property
    def cancelled(self) -> bool:
        """The round is over before we were; iterating ends by itself."""
        return self._round.cancelled

    def __len__(self) -> int:
        return len(self._batch) if isinstance(self._batch, RoundBatch) else 1

    def __iter__(self) -> Iterator[Any]:
        batch, strategy = self._batch, self._strategy
        pieces = batch.micro_batches() if isinstance(batch, RoundBatch) else iter([(batch, 1.0)])
        for number, (piece, weight) in enumerate(pieces, start=1):
            strategy._weight = weight
            with strategy._gradients_stay_here() if number < len(self) else nullcontext():
                yield strategy.batch_to_device(piece)
            if self.cancelled:
                return


class FabricRounds:
    """Iterates over the rounds in which we train, to the end of the run, and leaves it then, or at :meth:`close`.

    Usable as a context manager, which is how a loop that may end early leaves the run in good order.
    """

    def __init__(self, strategy: FabricPsycheStrategy, open_session: Callable[[], FrameworkSession]) -> None:
        self._strategy = strategy
        self._open_session = open_session
        self._began = False

    def __iter__(self) -> Iterator[FabricRound]:
        return self

    def __next__(self) -> FabricRound:
        if not self._began:
            self._began = True
            self._open_session()
        try:
            return self._strategy._next_fabric_round()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves the run. May be called again."""
        self._strategy.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FabricPsycheStrategy(OneDevice, DDPStrategy):
    """Trains with peers over the internet, in a loop with Fabric: see the module.

    Several devices of this machine are one peer. Reductions and barriers stay on this machine.

    Args:
        run: a ticket, ``"host:port/run-id"`` or ``"solana:run-id"``; None hosts.
        data_parallel_size, tensor_parallel_size: of a model that the devices hold together, as for Fabric's
            ``ModelParallelStrategy``. One of them follows from the other; with neither, each device has the whole
            model.
        parallelize_fn: is given the module in :meth:`fabric.setup_module` and :attr:`device_mesh`, shards it, and
            returns it. None where the script has done so itself, after ``fabric.launch()``.
        **options: see :class:`~.options.TrainingOptions` and :class:`~.options.ConnectionOptions`. What
            ``config`` leaves open is taken from :meth:`rounds`. Other arguments go to ``DDPStrategy``; they matter with
            several devices.

    Raises:
        ConfigurationError: an argument is wrong.
    """

    _runner = "Fabric"
    _mesh_is_there = "from fabric.launch() on"

    @shows(TrainingOptions, STRATEGY_DEFAULTS, and_more=True)
    def __init__(
        self,
        run: str | None = None,
        *,
        data_parallel_size: int | None = None,
        tensor_parallel_size: int | None = None,
        parallelize_fn: Callable[[Any, DeviceMesh], nn.Module] | None = None,
        **options: Unpack[StrategyOptions],
    ) -> None:
        tell_mistakes_in_one_line()
        self._options, others = split_options(options, of=type(self).__name__)
        check_for_ddp(others, of="FabricPsycheStrategy", ddp=type(self))
        super().__init__(**others)
        if run is not None:
            check_run(run, self._options.get("solana"))
        self._shard_sizes = ShardSizes.of(data_parallel_size, tensor_parallel_size)
        if parallelize_fn is not None and self._shard_sizes is None:
            raise ConfigurationError(
                "parallelize_fn shards a model over devices: give data_parallel_size or tensor_parallel_size, too",
                name="parallelize_fn",
            )
        self._parallelize = parallelize_fn
        self.run = run
        self.config = options.get("config")
        self._backward_sync_control = _SyncAmongDevices()
        self._module: nn.Module | None = None
        self._optimizer: DisTrO | None = None
        self._loader: RoundLoader | None = None
        self._last = Ended()
        self._forget()

    def _forget(self) -> None:
        self._session: FrameworkSession | None = None
        self._round: Round | None = None
        self._weight = 1.0
        self._loss: Tensor | None = None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        if "psyche" not in strategy_registry:
            strategy_registry.register("psyche", cls, description="hosts a run for peers")

    # -- the run -------------------------------------------------------------------------------------------------------

    def rounds(
        self,
        loader: DataLoader[Any],
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
        schedulers: Sequence[Any] = (),
        by_index: bool = True,
        audit_loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> FabricRounds:
        """The rounds of the run, instead of ``fabric.setup_dataloaders(loader)``. It is joined with the first one.

        Args:
            loader: the training data, not set up with Fabric.
            max_steps, max_epochs: how long a run that is hosted shall be, where its config does not say. An epoch is
                one pass over the data by all peers together.
            schedulers: of the learning rate. They follow the run's step; do not step them.
            by_index: False leaves the choice of samples to the loader's own sampler.
            audit_loss: in a run with :attr:`.RunConfig.audit_fraction`, what others' results are audited with: given
                the model and a batch as the rounds have it, it returns the mean loss with its graph, not times any
                weight, and calls no ``backward``. Without it this peer audits nobody.

        Raises:
            ConfigurationError: the loader cannot be asked for single samples.
        """
        if self._module is None or self._optimizer is None:
            raise ConfigurationError(
                "rounds() needs a model and its optimizer: first `model, optimizer = fabric.setup(model, optimizer)`",
                name="rounds",
            )
        model, optimizer = self._module, self._optimizer
        self._loader = source = RoundLoader(samples_of(loader, by_index=by_index), self)
        complete = partial(self._completed, source.samples, max_steps, max_epochs)
        return FabricRounds(self, lambda: self._join(model, optimizer, source, complete, schedulers, audit_loss))

    @property
    def session(self) -> FrameworkSession | None:
        """Our part in the run; None but while :meth:`rounds` are gone through."""
        return self._session

    @property
    def num_peers(self) -> int:
        """Peers of the run's present epoch, ourselves included; 1 while we are in no run."""
        return 1 if self._session is None else max(1, self._session.num_peers)

    @property
    def peer_index(self) -> int | None:
        """Our place among them; None while we are not in the epoch."""
        return None if self._session is None else self._session.peer_index

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run``."""
        return None if self._session is None else self._session.ticket

    def view(self) -> RunView | None:
        """A snapshot of the run for logs and live tables, from any thread; after the rounds the last one."""
        return self._last.view if self._session is None else self._session.view()

    def summary(self) -> str | None:
        """What remains of the run in a few lines: peers, bytes, time, and the hash of the weights; None before one."""
        return self._last.summary if self._session is None else self._session.summary()

    def leave(self) -> None:
        """Leaves the run. The model has its true weights then. May be called again."""
        session = self._session
        self._forget()
        if session is not None:
            self._last = session.end()
        if self._loader is not None:
            self._loader.samples.close()

    def _join(
        self,
        model: nn.Module,
        optimizer: DisTrO,
        loader: RoundLoader,
        complete: Callable[[RunConfig], RunConfig],
        schedulers: Sequence[Any],
        audit_loss: Callable[[nn.Module, Any], Tensor] | None,
    ) -> FrameworkSession:
        if self._session is not None:
            raise DistroError("the rounds of another loader are not over: close() them first")
        session = FrameworkSession(
            model,
            optimizer,
            run=self.run,
            dataset_size=loader.samples.size,
            complete=complete,
            interrupt=lambda: None,
            ranks=None if self._alone else LocalRanks(),
            audit_loss=None if self._shard_sizes else self._audit_loss(model, loader.samples, audit_loss),
            **self._options,
        )
        session.by_data_index = loader.samples.by_data_index
        session.audit_size = loader.samples.micro_batch_size
        session.look_over = look_at_first_sample(session, loader.samples, model)
        if schedulers:
            session.follow(*schedulers)
        session.start()
        self._session = session
        if self.is_global_zero:
            session.invite("FabricPsycheStrategy(run={ticket!r})")
        return session

    def _audit_loss(
        self, model: nn.Module, samples: Samples, loss_of: Callable[[nn.Module, Any], Tensor] | None
    ) -> Callable[[list[int]], Tensor] | None:
        """Of samples, from that of a batch; None where there is none."""
        if loss_of is None or not samples.can_load:
            return None

        def loss(indices: list[int]) -> Tensor:
            # The model itself: what Fabric wraps around it lets nobody but fabric.backward differentiate.
            batch = self.precision.convert_input(self.batch_to_device(samples.load(indices)))
            with self.precision.forward_context():
                return loss_of(model, batch)

        return loss

    def _completed(
        self, samples: Samples, max_steps: int | None, max_epochs: int | None, config: RunConfig
    ) -> RunConfig:
        batch_size = default_batch_size(
            config,
            peer_batch_size=samples.micro_batch_size * self.place_among_devices[1],
            dataset_size=samples.size,
        )
        steps = [max_steps] if max_steps is not None else []
        if max_epochs is not None and samples.size is not None:
            steps.append(max_epochs * rounds_per_pass(samples.size, batch_size))
        return complete_config(config, batch_size=batch_size, max_steps=min(steps, default=None))

    # -- rounds --------------------------------------------------------------------------------------------------------

    def next_round(self) -> Round | None:
        """Of :class:`~.round_loader.RoundSource`."""
        if self._session is None:
            raise DistroError("there are no rounds outside of a run: ask the strategy for rounds()")
        self._round, self._weight, self._loss = self._session.next_round(), 1.0, None
        return self._round

    def _next_fabric_round(self) -> FabricRound:
        if self._session is None or self._loader is None:
            raise StopIteration
        batch = next(self._loader)  # which asks for next_round()
        if self._round is None:
            raise StopIteration
        return FabricRound(self._round, batch, self)

    @property
    def rounds_per_epoch(self) -> int:
        """Of :class:`~.round_loader.RoundSource`."""
        state = self._session.state if self._session is not None else None
        size = self._loader.samples.size if self._loader is not None else None
        if state is None or size is None:
            raise ConfigurationError("how many rounds make an epoch is known only in a run, of a dataset with a length")
        return rounds_per_pass(size, state.config.global_batch_size_end)

    @property
    def place_among_peers(self) -> tuple[int, int]:
        """Of :class:`~.round_loader.RoundSource`."""
        return self.peer_index or 0, self.num_peers

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        rank, size = self.place_among_devices
        return {"num_replicas": size, "rank": rank}

    def _gradients_stay_here(self) -> AbstractContextManager[None]:
        """No reduction among devices; more batches of the round are to come."""
        wrapped = self._wrapped
        return nullcontext() if wrapped is None else wrapped.no_sync()

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """In a round, of the loss times what its batch counts in the round."""
        if self._round is not None:
            tensor = tensor * self._weight
            self._loss = tensor.detach() if self._loss is None else self._loss + tensor.detach()
        super().backward(tensor, module, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizable, **kwargs: Any) -> Any:
        """In a run, a step is a contribution to the round: the session has taken over ``DisTrO.step``."""
        if self._session is None:
            return super().optimizer_step(optimizer, **kwargs)
        if self._round is None or not self._round.open:
            raise DistroError("optimizer.step() outside of a round: in a run, one step is taken in each of rounds()")
        if "closure" not in kwargs and getattr(self.precision, "scaler", None) is None:
            kwargs["closure"] = lambda: self._loss  # computed already; the run tells it to those who look
        output = super().optimizer_step(optimizer, **kwargs)
        # Still open if the scaler of 16-mixed found an overflow: the others need not wait for us.
        self._round.skip()
        return output

    # -- this machine --------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        if self.num_nodes != 1:
            raise ConfigurationError(
                f"num_nodes={self.num_nodes}: a peer is one machine, so start the script on each one, on all but the "
                "first with FabricPsycheStrategy(run=<the ticket>), and leave num_nodes at 1",
                name="num_nodes",
                value=self.num_nodes,
            )
        super()._configure_launcher()

    @override
    def _setup_distributed(self) -> None:
        if self._alone:
            self._set_world_ranks()
        else:
            super()._setup_distributed()
        if self._shard_sizes is not None:
            self._device_mesh = self._mesh_of(self._shard_sizes)

    @override
    def setup_module(self, module: nn.Module) -> Any:
        if self._device_mesh is not None:
            module = module if self._parallelize is None else self._parallelize(module, self._device_mesh)
            check_in_shards(module, where="parallelize_fn, over the mesh that it is given")
            _materialize_distributed_module(module, self.root_device)
        self._module = module
        is_whole = self._alone or self._device_mesh is not None
        self._wrapped: DistributedDataParallel | None = None if is_whole else super().setup_module(module)
        return module if self._wrapped is None else self._wrapped

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if self._optimizer is not None and optimizer is not self._optimizer and self._session is not None:
            raise DistroError("a run trains with one optimizer: set up another one when it is over")
        self._optimizer = check_optimizers([optimizer])
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if self._device_mesh is not None and not any(map(is_sharded, params)):
            raise ConfigurationError(
                "the optimizer has the parameters of before the model was sharded: first model = "
                "fabric.setup_module(model), then optimizer = fabric.setup_optimizers(DisTrO(model.parameters(), ...))",
                name="optimizer",
            )
        return super().setup_optimizer(optimizer)

    @override
    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        if self._session is not None and self._optimizer is not None:
            self._optimizer.undo_lookahead()
        if self._device_mesh is not None:
            return whole_state(module, keep=self.is_global_zero)
        return super().get_module_state_dict(module)

    @override
    def load_module_state_dict(self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True) -> None:
        if self._device_mesh is not None:
            load_whole(module, state_dict, strict=strict)
        else:
            super().load_module_state_dict(module, state_dict, strict)

    @override
    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return tensor if self._alone else super().all_reduce(tensor, group, reduce_op)


class _SyncAmongDevices(_BackwardSyncControl):
    """``fabric.no_backward_sync``; without effect on one device, which has nobody to synchronize with."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        if enabled and isinstance(module, DistributedDataParallel):
            return module.no_sync()
        return nullcontext()


FabricPsycheStrategy.register_strategies(STRATEGY_REGISTRY)
