"""Every run of a few peers, some of them liars: can the votes make an honest peer with standing take a liar's weights?

The books of standing are the real ones, and so is the rule. For each honest peer, each place in the list, each epoch in
which the others come, and each way in which they work (honest ones in time or late by a round, liars working or idle)
its book is kept through two epochs of three rounds. Then every combination of reports is judged, early and finally:
those of honest peers come or do not, and each liar tells the truth, one of two lies, or nothing.

    PYTHONPATH=src:tests python -m rounds.vote_simulation --peers 5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

from distro_optim.strategy.rounds.trust.standing import Standing
from distro_optim.strategy.rounds.trust.votes import Electorate, decide

EPOCHS, ROUNDS = 2, 3
TRUTH, LIES = 0, (1, 2)


@dataclass(frozen=True)
class Seat:
    """What one honest peer with standing sees: who it is, who lies, and who decides."""

    me: bytes
    liars: frozenset[bytes]
    electorate: Electorate

    @property
    def is_safe(self) -> bool:
        """Whether what the page on assumptions asks for holds: the host is honest, or most voters are."""
        if self.electorate.host is not None:
            return self.electorate.host not in self.liars
        lying = len(self.liars.intersection(self.electorate.voters))
        return lying < len(self.electorate.voters) - lying


def seats(peers: int, liars: int, *, host: bool) -> set[Seat]:
    """All that can come about among so many peers."""
    names = [bytes([number]) for number in range(peers)]
    found: set[Seat] = set()
    for lying in map(frozenset, combinations(names, liars)):
        for me in (name for name in names if name not in lying):
            others = [name for name in names if name != me]
            # In which epoch each comes, and in which of them its results are in time (of a liar: are at all).
            for lives in product(product((0, 1), repeat=1 + EPOCHS), repeat=len(others)):
                book = Standing(me)
                for epoch in range(EPOCHS):
                    there = [me, *(o for o, life in zip(others, lives, strict=True) if life[0] <= epoch)]
                    clients = tuple(name for name in names if name in there)
                    book.begin_epoch(clients)
                    works = {o: bool(life[1 + epoch]) for o, life in zip(others, lives, strict=True)} | {me: True}
                    counted = [name for name in clients if works[name]]
                    silent = [name for name in clients if not works[name] and name in lying]
                    for _ in range(ROUNDS):
                        voters = book.voters(clients)
                        if book.is_ours_earned:
                            hosts = [name for name in clients if name not in lying] if host else [None]
                            found.update(Seat(me, lying, Electorate(clients, voters, h)) for h in hosts)
                        book.end_round(counted, silent)
    return found


def reports(seat: Seat) -> Iterator[dict[bytes, int]]:
    """Everything that may have come when it is judged."""
    others = [client for client in seat.electorate.clients if client != seat.me]
    choices = [(TRUTH, None, *LIES) if client in seat.liars else (TRUTH, None) for client in others]
    for said in product(*choices):
        yield {client: value for client, value in zip(others, said, strict=True) if value is not None}


def failures(seat: Seat) -> int:
    """In how many cases this peer would give up its weights."""
    me, electorate = seat.me, seat.electorate
    return sum(
        decide(me, TRUTH, said, electorate, final=final).right != TRUTH
        for said in reports(seat)
        for final in (False, True)
    )


def simulate(peers: int, liars: int, *, host: bool) -> tuple[int, int, int]:
    """Numbers of seats, of those that are safe by the assumptions, and of failures in the safe ones."""
    found = seats(peers, liars, host=host)
    safe = [seat for seat in found if seat.is_safe]
    return len(found), len(safe), sum(map(failures, safe))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--liars", type=int, default=2)
    options = parser.parse_args()
    print("peers  liars  host  what one sees  safe  failures")
    for peers in range(2, options.peers + 1):
        for liars in range(1, min(options.liars, peers - 1) + 1):
            for host in (True, False):
                total, safe, failed = simulate(peers, liars, host=host)
                print(
                    f"{peers:5}  {liars:5}  {'yes' if host else 'no':>4}  {total:13}  {safe:4}  {failed:8}", flush=True
                )


if __name__ == "__main__":
    main()
