"""The rules of a parameter group, and what counts where it does not say.

Two choices that do not depend on each other:

``direction``  what a peer takes into what it sends. ``"momentum"``: its gradients, as DeMo and Psyche do.
               ``"orthogonal"``: the direction in which Muon would step, see :mod:`~distro_optim.optim.orthogonal`.
``update``     what everybody makes of what was sent. ``"sign"``: the sign of the decoded update, as DeMo and Psyche do.
               ``"rms"``: the decoded update itself, over its root mean square.

A third choice goes with the direction, and each peer has it for itself:

``ahead``      by what gradients are taken ahead with overlap, since what was sent arrives a step late. ``"sign"``: by
               the sign of the momentum, as Psyche does; with the published direction only. ``"direction"``: by the last
               direction. ``"delta"``: by all directions that have not arrived, what was not sent of them included.

All peers must have the same ``update`` and ``gain``, which decide on the weights. A direction shapes only what a peer
sends, but a swarm in which it differs learns less than either, so that it is compared as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

__all__ = ["AHEAD", "DIRECTIONS", "PUBLISHED", "RULES", "Ahead", "Direction", "is_orthogonal", "with_defaults"]

Direction = Literal["momentum", "orthogonal"]
"""What is taken into the momentum that is sent."""

DIRECTIONS: Final[tuple[str, ...]] = get_args(Direction)

Ahead = Literal["sign", "direction", "delta"]
"""By what gradients are taken ahead."""

AHEAD: Final[dict[str, tuple[Ahead, ...]]] = {"momentum": ("sign",), "orthogonal": ("direction", "delta")}
"""What can be chosen with which direction; the first is what counts where a group does not say."""

PUBLISHED: Final[dict[str, Any]] = {"direction": "momentum", "update": "sign", "gain": 1.0}
"""The rules of DeMo and of Psyche: also those of whoever does not say."""

RULES: Final = tuple(PUBLISHED)
"""Settings of a parameter group in which all peers are alike."""

_DECAYS: Final = {"momentum": 0.999, "orthogonal": 0.7}
"""What is left of the momentum after a step. What was not sent of an orthogonal direction is soon out of date."""

_GAINS: Final = {"sign": 1.0, "rms": 2.0}
"""One rate served best with them, of those tried, in each rule."""


def is_orthogonal(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group has Muon's direction."""
    return bool(group["direction"] == "orthogonal")


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with those that are None replaced by what suits the rules, which are valid."""
    chosen = dict(settings)
    if chosen["compression_decay"] is None:
        chosen["compression_decay"] = _DECAYS[chosen["direction"]]
    if chosen["gain"] is None:
        chosen["gain"] = _GAINS[chosen["update"]]
    if chosen["ahead"] is None:
        chosen["ahead"] = AHEAD[chosen["direction"]][0]
    return chosen
