"""Which of several reports on the weights of a step is right. No I/O.

The rule, for runs of our own kind:

1. While the host trains in its run, its report is right, and ours is if we are the host. (``trust="peers"``: not so.)
2. Otherwise voters decide. A voter is who has standing: results of it that a quorum saw, and that fit here.
3. If any client of the epoch had standing before it began, only those vote: newcomers never outweigh them.
4. Standing is lost by three rounds of silence in a row, and by an epoch without being in its list.
5. Each voter has one vote, for the hash that it reports; equal hashes are a group. We vote for ours.
6. A voter gives its weights up only to a group that is larger than its own and all votes that are still out together,
7. or that is as large as these, and has the member with the longest standing, by the list among equals.
8. Who has no vote gives its weights up to a group that the votes still out cannot outdo; when no more are waited for,
   to the largest.
9. Where nobody has standing, as in the first rounds of a run, all vote; when no more are waited for, the largest group
   is right, and of equal ones the one with the first of the list.
10. What is given up is taken only from members of the group that is right, and from other voters if none of them can
    be reached; a host takes nothing.

So a peer with standing takes no liar's weights while the host is honest and trains, or while among those with
standing honest ones with equal weights outnumber the liars, whoever is late and whatever is not heard.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Electorate", "Outcome", "decide"]

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Electorate:
    """Who decides about the weights of a step; public keys of 32 bytes.

    Attributes:
        clients: of the epoch, in the order of its list.
        voters: those with standing, the longest first; empty if nobody has any, or the run is not of our own kind.
        host: the client that is believed whatever the others say; None if there is none.
    """

    clients: tuple[bytes, ...]
    voters: tuple[bytes, ...] = ()
    host: bytes | None = None

    @property
    def deciding(self) -> tuple[bytes, ...]:
        """Host and voters: whom to ask for the weights first."""
        return tuple(dict.fromkeys([*(() if self.host is None else (self.host,)), *self.voters]))


@dataclass(frozen=True)
class Outcome(Generic[H]):
    """What was decided.

    Attributes:
        right: the value that is right; ours if nothing speaks against it.
        members: of the group that is right, those that decide first, without us.
        certain: nothing that is still to come would change it.
        heard: how many others have said something that counts.
    """

    right: H
    members: tuple[bytes, ...]
    certain: bool
    heard: int


def decide(me: bytes, ours: H, said: Mapping[bytes, H], electorate: Electorate, *, final: bool) -> Outcome[H]:
    """The rule of the module.

    Args:
        me: our own public key.
        ours: what we have.
        said: what others have, as they say; only the electorate's members count.
        electorate: who decides.
        final: nothing more is waited for.
    """
    host = electorate.host
    if host == me:
        equal = tuple(key for key in electorate.clients if key != me and said.get(key) == ours)
        return Outcome(ours, equal, True, len(equal))
    if host is not None and host in said:
        right = said[host]
        others = (key for key in electorate.voters if key not in (me, host) and said.get(key) == right)
        return Outcome(right, (host, *others), True, 1)
    # If we were taken off the list, we stand last in it.
    order = electorate.voters or tuple(dict.fromkeys([*electorate.clients, me]))
    groups: dict[H, list[bytes]] = {}
    for key in order:
        if key == me:
            groups.setdefault(ours, []).append(me)
        elif key in said:
            groups.setdefault(said[key], []).append(key)
    heard = sum(map(len, groups.values())) - (me in order)
    missing = [key for key in order if key != me and key not in said]
    own = groups.get(ours, [])

    def outcome(right: H, certain: bool) -> Outcome[H]:
        members = tuple(key for key in groups.get(right, ()) if key != me)
        return Outcome(right, members, certain, heard)

    if host is not None or not groups:
        return outcome(ours, False)  # the host has not spoken, and nobody else may speak against us
    # max() keeps the first of equals, and groups stand in the order of their first members.
    best = max(groups, key=lambda value: len(groups[value]))
    if not electorate.voters:
        majority = 2 * len(groups[best]) > len(electorate.clients)
        return outcome(best, True) if final or majority else outcome(ours, False)
    if me in order:
        rivals = [value for value in groups if value != ours]
        if not rivals:
            return outcome(ours, not missing)
        best = max(rivals, key=lambda value: len(groups[value]))
        against = len(own) + len(missing)
        is_senior = order.index(groups[best][0]) < min(order.index(key) for key in [*own, *missing])
        if len(groups[best]) > against or (len(groups[best]) == against and is_senior):
            return outcome(best, True)
        return outcome(ours, 2 * len(own) > len(order))
    second = max((len(members) for value, members in groups.items() if value != best), default=0)
    if len(groups[best]) > second + len(missing) or final:
        return outcome(best, True)
    return outcome(ours, False)
