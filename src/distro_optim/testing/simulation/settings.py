"""What is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...coordinator.types import MAX_NUM_CLIENTS
from ...errors import ConfigurationError

__all__ = ["SimulationOptions"]

MIN_ROUNDS: Final = 3
"""A result is applied two rounds after its own."""


@dataclass(frozen=True, kw_only=True)
class SimulationOptions:
    """One simulation. The defaults are a swarm of homes with good lines.

    Attributes:
        peers: that begin; the first of them hosts the run.
        rounds: that are trained.
        seed: of all that is random.
        train_seconds: that a peer trains in a round.
        jitter: share by which this differs from round to round and peer to peer, up or down.
        latency: shortest and longest one-way seconds between two peers; each peer has its distance from the middle.
        bandwidth: bits a second of each peer's line, in each direction.
        loss: chance that a message does not reach one peer, and that a download from one provider fails.
        stragglers: peers that take ``straggler_factor`` times as long to train.
        straggler_factor: see there.
        joiners: peers that come later, one after the other.
        liars: peers, besides the honest ones, that lie from the beginning, each in one of the ways of
            :mod:`.liars` by turns.
        parameters: of the model whose results and weights the network is charged for; None charges the few hundred
            bytes of the model that is really trained.

    Raises:
        ConfigurationError: a value cannot be simulated; says which can.
    """

    peers: int = 16
    rounds: int = 10
    seed: int = 0
    train_seconds: float = 1.0
    jitter: float = 0.1
    latency: tuple[float, float] = (0.01, 0.1)
    bandwidth: float = 50e6
    loss: float = 0.0
    stragglers: int = 0
    straggler_factor: float = 3.0
    joiners: int = 0
    liars: int = 0
    parameters: int | None = None

    def __post_init__(self) -> None:
        _at_least("peers", self.peers, 1)
        _at_least("rounds", self.rounds, MIN_ROUNDS)
        for name in ("seed", "stragglers", "joiners", "liars"):
            _at_least(name, getattr(self, name), 0)
        if self.everybody > MAX_NUM_CLIENTS:
            raise ConfigurationError(
                f"{self.everybody} peers, joiners and liars: the state of a run has room for {MAX_NUM_CLIENTS}",
                name="peers",
                value=self.everybody,
            )
        if self.stragglers >= self.peers:
            raise ConfigurationError(
                f"stragglers is {self.stragglers}, of {self.peers} peers: the host is never one",
                name="stragglers",
                value=self.stragglers,
            )
        low, high = self.latency
        if not 0 < low <= high:
            raise ConfigurationError(f"latency is a pair 0 < low <= high, got {self.latency}", name="latency")
        if not 0 <= self.loss < 1:
            raise ConfigurationError(f"loss is at least 0 and below 1, got {self.loss}", name="loss", value=self.loss)
        if not 0 <= self.jitter < 1:
            raise ConfigurationError(f"jitter is from 0 to below 1, got {self.jitter}", name="jitter")
        for name in ("train_seconds", "bandwidth", "straggler_factor"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be above 0, got {getattr(self, name)}", name=name)
        if self.parameters is not None:
            _at_least("parameters", self.parameters, 1)

    @property
    def everybody(self) -> int:
        """All that ever take part."""
        return self.peers + self.joiners + self.liars


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigurationError(f"{name} must be a whole number from {low}, got {value!r}", name=name, value=value)
