"""Whether the program of a run understands a checkpoint as it is written now. No I/O, no clock.

On 2026-02-20 the argument of ``checkpoint`` changed from a repository of the hub to any place of a model, and its name
did not (PsycheFoundation/psyche, ``solana-coordinator``). An older program takes the first byte of the new form for the
first letter of a repository, without any error, and the run's model is then nowhere. An instruction does not tell which
form a program knows; the time at which the program was last deployed does: what was deployed before cannot know it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ....errors import CoordinatorLinkError

__all__ = ["FORMAT_SINCE", "Deployment", "OldProgramError", "check_checkpoint_format"]

FORMAT_SINCE: Final = 1_771_545_600
"""2026-02-20 00:00 UTC, the day of the change, as Unix time in seconds."""

_DAY: Final = "2026-02-20"

SHORTEST_SLOT: Final = 0.35
"""Seconds on average over days; nodes aim at 0.4 and have hardly ever been faster."""

LONGEST_SLOT: Final = 0.8
"""Likewise; in its worst months mainnet needed about 0.7."""


class OldProgramError(CoordinatorLinkError):
    """A checkpoint was not sent, since the program may take it for something else."""


@dataclass(frozen=True)
class Deployment:
    """When a program was last deployed, as far as a cluster tells.

    Attributes:
        is_built_in: it is a part of the node, as in a test validator, and of this day.
        slot: of the deployment; None if the program is of a kind that does not keep it.
        unix_timestamp: of that slot, in seconds; None if no node remembers.
        slot_now, unix_timestamp_now: by the cluster's clock.
    """

    is_built_in: bool = False
    slot: int | None = None
    unix_timestamp: int | None = None
    slot_now: int = 0
    unix_timestamp_now: int = 0

    def bounds(self) -> tuple[float, float] | None:
        """Unix times between which it was; None if nothing is known of it."""
        if self.unix_timestamp is not None:
            return self.unix_timestamp, self.unix_timestamp
        if self.slot is None:
            return None
        slots = max(0, self.slot_now - self.slot)
        return self.unix_timestamp_now - slots * LONGEST_SLOT, self.unix_timestamp_now - slots * SHORTEST_SLOT


def check_checkpoint_format(program: object, deployment: Deployment) -> None:
    """Raises OldProgramError unless the program was deployed after the change.

    Args:
        program: its id, for the message.
        deployment: of it.
    """
    if deployment.is_built_in:
        return
    bounds = deployment.bounds()
    if bounds is not None and bounds[0] >= FORMAT_SINCE:
        return
    if bounds is not None and bounds[1] < FORMAT_SINCE:
        raise OldProgramError(
            f"the checkpoint was not sent: the program {program} was deployed before {_DAY}, in slot "
            f"{deployment.slot}, when checkpoints had another form, and would take this one for another repository "
            "without any error: deploy a newer build, or pause the run and set the model with configure"
        )
    reason = (
        "does not tell when it was deployed"
        if bounds is None
        else f"was deployed around {_DAY}, in slot {deployment.slot}, whose day no node remembers"
    )
    raise OldProgramError(
        f"the checkpoint was not sent: the program {program} {reason}, and a build from before that day would take "
        "it for another repository without any error: if you know that the build is newer, send it with "
        "--unchecked-format (in Python: check_format=False)"
    )
