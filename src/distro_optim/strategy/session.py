"""A training loop in a run: the object that a script, Fabric or Lightning trains through.

::

    with SwarmSession(model, DisTrO(model.parameters(), lr=1e-3), run=ticket, dataset_size=len(data)) as session:
        for round in session.rounds():
            for indices in round.micro_batches(32):
                loss = loss_of(model, data, indices)
                (loss * len(indices) / len(round.indices)).backward()
            round.finish(loss=loss)

What the run wants done to the model besides, the session does while the script waits for its next round: loading it,
applying everybody's results, weight decay, hashes, checkpoints. All of it happens in the thread of the script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..comm.signing import SecretKey
from ..optimizer import DisTrO
from .config import RunConfig
from .port import RunPort, RunView

if TYPE_CHECKING:
    from ..coordinator.types import BatchId

__all__ = ["LearningRates", "Round", "SwarmSession"]

LearningRates = Literal["script", "run"]


class Round:
    """A round in which we train. While it is open, the weights look ahead; see :meth:`DisTrO.lookahead`.

    Attributes:
        step: of the run.
        batch: the coordinator's data indices, ``start`` to ``end`` inclusive.
    """

    step: int
    batch: BatchId

    @property
    def indices(self) -> list[int]:
        """Our samples: indices into the dataset, as :func:`~.data.sample_indices` maps them. Never empty.

        Raises:
            ConfigurationError: the session was not told ``dataset_size``.
        """
        raise NotImplementedError

    def micro_batches(self, size: int) -> Iterator[list[int]]:
        """:attr:`indices` in pieces of at most ``size``; ends early when the round is cancelled."""
        raise NotImplementedError

    @property
    def cancelled(self) -> bool:
        """The round is over before we were: what is computed for it now is of no use. Cheap; ask between batches."""
        raise NotImplementedError

    @property
    def open(self) -> bool:
        """Neither :meth:`finish` nor :meth:`skip` was called yet."""
        raise NotImplementedError

    def finish(self, loss: float | Tensor | None = None) -> bool:
        """Publishes what the gradients say, and takes the lookahead off. Calling it again does nothing.

        Args:
            loss: mean over our samples, for logs and :meth:`SwarmSession.view`.

        Returns:
            False if the round was cancelled, so that nothing was published.
        """
        raise NotImplementedError

    def skip(self) -> bool:
        """As :meth:`finish`, but without the gradients: takes part with a contribution that says nothing."""
        raise NotImplementedError


class SwarmSession:
    """One participant in a run, from :meth:`start` to :meth:`close`, or as a context manager.

    Hosting (``run=None``) begins a run and makes :attr:`ticket`; joining takes one, or ``"host:port/run-id"``. In a
    run of our own kind all peers run the same script: model, optimizer settings, schedule, dataset size; who joins
    with another one gets :class:`ModelMismatchError`, which names the first difference. In a run of Psyche's the
    coordinator's settings of the optimizer and its learning rates count; what they change is told once.

    Args:
        model: unwrapped; on the device on which it trains.
        optimizer: of its parameters, with ``overlap=True``. Not stepped by hand: in a session, ``optimizer.step()``
            does what :meth:`Round.finish` does.
        run: a ticket or an address; None hosts.
        config: of a hosted run.
        dataset_size: samples in the dataset; the same on all peers. Not needed if only :attr:`Round.batch` is used.
        data_seed: of the order of samples; by default made from the run's name.
        secret_key: who we are; by default somebody new each time.
        relay: ``"default"``, ``"none"`` or addresses of relays.
        checkpoint_dir: folder for checkpoints, one at the end of each epoch and one at the end; None saves nothing.
        keep_checkpoints: how many stay.
        resume: go on from the newest checkpoint there, if there is one. Who joins takes the run's weights if those
            differ, and says so.
        learning_rates: ``"script"``: the parameter groups' own; ``"run"``: the coordinator's. None takes "script" in
            runs of our own kind.
        on_event: called with news in words, one sentence each; they are logged besides.
        port: instead of the connection made from ``run``, ``config``, ``secret_key`` and ``relay``.

    Raises:
        ConfigurationError: an argument is wrong, or the optimizer is no DisTrO of this model's parameters.

    Attributes:
        follow_schedule: called with the step before anything of a new step is carried out, so that the script's
            learning rates are those of the step; see :meth:`follow`.
    """

    follow_schedule: Callable[[int], None] | None

    def __init__(
        self,
        model: nn.Module,
        optimizer: DisTrO,
        *,
        run: str | None = None,
        config: RunConfig | None = None,
        dataset_size: int | None = None,
        data_seed: int | None = None,
        secret_key: SecretKey | None = None,
        relay: str | Sequence[str] = "default",
        checkpoint_dir: str | PathLike[str] | None = None,
        keep_checkpoints: int = 3,
        resume: bool = False,
        learning_rates: LearningRates | None = None,
        on_event: Callable[[str], None] | None = None,
        port: RunPort | None = None,
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Loads the checkpoint to resume from, and hosts or joins the run. Blocks until the coordinator has taken us.

        Raises: as :meth:`RunPort.start`.
        """
        raise NotImplementedError

    def close(self, timeout: float = 5.0) -> None:
        """Leaves the run and releases everything. The model has its true weights then. May be called again."""
        raise NotImplementedError

    def __enter__(self) -> SwarmSession:
        raise NotImplementedError

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        raise NotImplementedError

    def rounds(self) -> Iterator[Round]:
        """The rounds in which we train, to the end of the run."""
        raise NotImplementedError

    def next_round(self) -> Round | None:
        """Waits for the next round in which we train, doing what the run wants done meanwhile; None at its end.

        Finishes the round before if that is still open.

        Raises:
            ModelMismatchError: our model is not the run's.
            RunLostError: the coordinator is gone for good.
            RunError: the run cannot go on with us for another reason.
        """
        raise NotImplementedError

    @property
    def round(self) -> Round | None:
        """The open round; None between rounds."""
        raise NotImplementedError

    def follow(self, *schedulers: Any) -> None:
        """Lets ``torch.optim.lr_scheduler`` schedulers of the optimizer follow the run's step; do not step them.

        Raises:
            ConfigurationError: a scheduler that depends on more than the step, such as ReduceLROnPlateau.
        """
        raise NotImplementedError

    @property
    def ended(self) -> bool:
        """The run is over."""
        raise NotImplementedError

    @property
    def step(self) -> int:
        """The run's step that the model is at: weights have everything applied that came before it."""
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        """The run's epoch, in the coordinator's sense: what is between two pauses in which peers come and go."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; 0 before :meth:`start`."""
        raise NotImplementedError

    @property
    def num_peers(self) -> int:
        """Clients of the present epoch."""
        raise NotImplementedError

    @property
    def peer_index(self) -> int | None:
        """Our place among them; None while we are not in the epoch."""
        raise NotImplementedError

    @property
    def ticket(self) -> str | None:
        """What others pass as ``run`` to join."""
        raise NotImplementedError

    @property
    def run_id(self) -> str:
        """The run's name."""
        raise NotImplementedError

    def view(self) -> RunView:
        """A snapshot for logs and live tables. For any thread."""
        raise NotImplementedError
