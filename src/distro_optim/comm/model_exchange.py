"""How a joiner gets the model from its peers: the seam between a client and whatever carries megabytes."""

from __future__ import annotations

import asyncio
import enum
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..errors import ExchangeError, ProtocolError
from .live_weights import FetchedTensors, LiveWeights, WantedTensors

if TYPE_CHECKING:
    import torch

__all__ = ["Check", "ModelExchange", "Patience", "SharedModel", "download_patiently"]

Check = Callable[[bytes, str, Sequence[str]], int | Mapping[str, int] | None]
"""Called with a peer, the text of its configuration and the names of its parameters, in another thread and before any
parameter is asked for. Raises ProtocolError if this is not the model that is wanted. May return lower bounds on the
bytes of a parameter, one for all or one for each name."""

_PAUSE_SECONDS: Final = 0.25
"""Between two attempts, when the first failed in the middle of the model."""

_SLACK_SECONDS: Final = 0.5
"""So that a search which ends in time can say why."""


class Patience(enum.Enum):
    """What to do about peers that have nothing to share."""

    ONCE = "each is asked once, and those that do not answer are not waited for if most of the others have nothing"
    SHORT = "they are asked again for some seconds, and longer if most of them cannot be reached"
    LONG = "they are asked again as long as there is time"


@dataclass(frozen=True)
class SharedModel:
    """A model as it travels.

    Attributes:
        config: text of ``config.json``.
        tokenizer: JSON of the tokenizer; empty if the model has none.
        parameters: by name, on the CPU.
    """

    config: str
    tokenizer: str = ""
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)


class ModelExchange(ABC):
    """Offers a model, and gets one. All methods belong to one event loop."""

    @abstractmethod
    def offer(self, model: SharedModel) -> None:
        """Shares ``model`` from now on, in place of what was shared before. It must not change any more."""

    @abstractmethod
    def withdraw(self) -> None:
        """Shares nothing any more."""

    @abstractmethod
    async def download(
        self,
        providers: Iterable[bytes],
        *,
        max_parameter_bytes: int,
        check: Check | None = None,
        progress: Callable[[int, int], None] | None = None,
        patience: Patience = Patience.ONCE,
        seconds: float = 0.0,
    ) -> SharedModel:
        """Gets the whole model from ``providers``, best first.

        Args:
            providers: public keys.
            max_parameter_bytes: a larger parameter is refused.
            check: see :data:`Check`.
            progress: called with parameters done and in all.
            patience: with providers that have nothing to share yet.
            seconds: of patience.

        Raises:
            ExchangeError: no peer sent it.
            ProtocolError: what they sent is not a model.
        """

    def offer_live(self, live: LiveWeights | None) -> None:  # noqa: B027 - an exchange may carry whole models only
        """Gives single tensors of the model in training to peers that ask, from now on; None gives none."""

    async def download_tensors(self, providers: Iterable[bytes], wanted: WantedTensors) -> FetchedTensors:
        """The tensors in which ours differ from those of ``providers``; see :func:`~.live_weights.fetch_differing`.

        Raises:
            ExchangeError: nobody gave them.
        """
        raise ExchangeError("single tensors cannot be fetched here")


async def download_patiently(
    models: ModelExchange,
    providers: Iterable[bytes],
    *,
    patience: Patience = Patience.LONG,
    seconds: float,
    max_parameter_bytes: int,
    check: Check | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SharedModel:
    """:meth:`ModelExchange.download`, in at most ``seconds``; with long patience it tries again after a failure.

    Raises:
        ExchangeError: no peer sent it in that time; the message holds the last reason.
    """
    providers = tuple(providers)
    if not providers:
        raise ExchangeError("there is no peer to ask for the model")
    reason: Exception | None = None
    began = time.monotonic()
    try:
        async with asyncio.timeout(seconds + _SLACK_SECONDS):
            while (left := began + seconds - time.monotonic()) > 0:
                try:
                    return await models.download(
                        providers,
                        max_parameter_bytes=max_parameter_bytes,
                        check=check,
                        progress=progress,
                        patience=patience,
                        seconds=left,
                    )
                except (ExchangeError, ProtocolError) as error:
                    reason = error
                if patience is not Patience.LONG:
                    break
                await asyncio.sleep(_PAUSE_SECONDS)
    except TimeoutError as error:
        reason = reason or error
    took = time.monotonic() - began
    raise ExchangeError(
        f"none of {len(providers)} peers shared the model in {took:.0f} s: {reason or 'no answer'}"
    ) from reason
