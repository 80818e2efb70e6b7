"""What of a run reaches the Hugging Face hub: one peer pushes, and the model card says how that was trained. No I/O.

All peers run the same script, so all of them call ``push_to_hub``; but they have the same weights, and one repository.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Self

from ..._version import __version__
from ...errors import ConfigurationError
from ...strategy.session import SwarmSession
from ...words import shown

__all__ = ["PushFrom", "TrainedInRun", "check_push_from", "with_section"]

PushFrom = Literal["host", "here"]
"""Who pushes: the peer that hosts the run, or this one, whoever hosts it."""

_BEGINS: Final = "<!-- distro_optim: how this model was trained -->"
_ENDS: Final = "<!-- end of distro_optim -->"
"""Around our section of a card, which is written again with each push."""

_HOME: Final = "https://github.com/distro-optim/distro_optim"


def check_push_from(given: object) -> PushFrom:
    """What the argument says.

    Raises:
        ConfigurationError: it is none of the two.
    """
    if given == "host":
        return "host"
    if given == "here":
        return "here"
    raise ConfigurationError(
        f'push_from={given!r}: give "host", so that the peer that hosts the run pushes, or "here" on the one that does',
        name="push_from",
        value=given,
    )


@dataclass(frozen=True, kw_only=True)
class TrainedInRun:
    """What a card says of a run.

    Attributes:
        run_id: its name, which may come from a stranger.
        step, total_steps: how far it came.
        batch_size: samples of a step.
        peers: that gave results which counted, as far as this peer knows; itself included.
        weights: root over the hashes of the weights, in hexadecimal; empty if it is not known.
    """

    run_id: str
    step: int
    total_steps: int
    batch_size: int
    peers: int
    weights: str

    @classmethod
    def of(cls, session: SwarmSession) -> Self:
        """As a session has seen it."""
        view, state = session.view(), session.state
        givers = sum(given.rounds > 0 for given in view.contributions.values())
        return cls(
            run_id=view.run_id,
            step=max(0, min(session.step - 1, session.total_steps)),
            total_steps=session.total_steps,
            batch_size=0 if state is None else state.config.global_batch_size_end,
            peers=max(1, givers, view.num_peers),
            weights="" if view.weights_root is None else view.weights_root.hex(),
        )

    def section(self) -> str:
        """For a card, in Markdown."""
        name = "".join(char for char in shown(self.run_id) if char not in "`<>|[]")
        peers = "one peer" if self.peers == 1 else f"{self.peers} peers"
        whole = "" if self.step >= self.total_steps else f" of {self.total_steps}"
        weights = f"\n\nHash of the weights at the last step that was checked: `{self.weights}`" if self.weights else ""
        return (
            f"## How this model was trained\n\nBy {peers} over the internet, in the run `{name}`: {self.step} steps"
            f"{whole} of {self.batch_size} samples, with [distro_optim]({_HOME}) {__version__}. Each peer trained "
            f"samples of its own and exchanged compressed updates (DisTrO) with the others; after each step all had "
            f"the same weights, bit for bit.{weights}"
        )


def with_section(card: str, section: str) -> str:
    """``card`` with ``section`` at its end, in place of the one that was there."""
    head, _, rest = card.partition(_BEGINS)
    tail = rest.partition(_ENDS)[2].strip() if rest else ""
    parts = [head.rstrip(), *([tail] if tail else []), f"{_BEGINS}\n\n{section}\n\n{_ENDS}"]
    return "\n\n".join(part for part in parts if part) + "\n"
