"""How a run has gone so far, in so few points that a page can draw them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

__all__ = ["History", "Point"]

MAX_POINTS: Final = 1200
"""More than a screen has pixels for. When there are more, every other one is forgotten."""

MAX_LOSSES: Final = 24
"""Peers whose losses a point has. Chosen so that colours can still be told apart, nearly."""


@dataclass(frozen=True)
class Point:
    """A step of the run. Sums count from the start of this process.

    Attributes:
        step: of the run.
        losses: that peers had last, by the first digits of their keys.
        sent, ddp: bytes, ours and those of gradients in bfloat16; None where that is not known.
        training, waiting: seconds of each round since the point before; None likewise.
    """

    step: int
    losses: Mapping[str, float] = field(default_factory=dict)
    sent: int | None = None
    ddp: int | None = None
    training: float | None = None
    waiting: float | None = None


class History:
    """Keeps points, at most :data:`MAX_POINTS`, evenly spread over the run. For one thread."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.thinned = 0
        """How often every other point was forgotten: then who has a copy needs a new one."""
        self._seconds: tuple[int, float, float] | None = None

    def add(
        self,
        step: int,
        losses: Mapping[str, float],
        *,
        sent: int | None = None,
        ddp: int | None = None,
        seconds: tuple[float, float] | None = None,
    ) -> Point | None:
        """The run is like this now; the point, if that is a step after the last one.

        Args:
            step: of the run.
            losses: see :class:`Point`.
            sent: likewise.
            ddp: likewise.
            seconds: of training and of waiting, since the beginning.
        """
        if self.points and step <= self.points[-1].step:
            return None
        training = waiting = None
        if seconds is not None:
            if self._seconds is not None and step > self._seconds[0]:
                rounds = step - self._seconds[0]
                training, waiting = ((seconds[i] - self._seconds[i + 1]) / rounds for i in (0, 1))
            self._seconds = step, *seconds
        kept = dict(sorted(losses.items())[:MAX_LOSSES])
        point = Point(step, kept, sent, ddp, training, waiting)
        self.points.append(point)
        if len(self.points) > MAX_POINTS:
            self.points = self.points[::2]
            self.thinned += 1
        return point

    def record(self) -> list[dict[str, Any]]:
        """All points as JSON has them."""
        return [asdict(point) for point in self.points]
