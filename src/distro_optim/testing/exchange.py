"""The contract of :class:`~distro_optim.comm.exchange.Exchange`, as checks to run against any implementation.

Peers in one process run in threads, each check with a new group::

    def test_my_exchange():
        check_exchange(lambda size: [MyExchange(...) for _ in range(size)])

Peers in processes of their own all call :func:`check_peer`, with the same arguments but for ``peer``. A check fails
with an AssertionError that names it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ..comm.exchange import Exchange
from ..compress import CompressedUpdate, ParamSpec, TilePlan, make_plan
from ..errors import ExchangeError
from .updates import random_update, same_update

__all__ = ["GROUP_CHECKS", "PEER_CHECKS", "check_exchange", "check_peer"]

PATIENCE: Final = timedelta(seconds=60)
"""How long a check may take before its peers count as hanging; never reached when all is well."""

_SHAPES: Final = ((), (37,), (24, 40), (6, 4, 3, 3), (0, 5))
"""0-D, prime, convolution and empty: every way in which tensors lie in batches."""

PeerCheck = Callable[[Exchange, int, int], None]
GroupCheck = Callable[[Sequence[Exchange]], None]


def check_exchange(
    make_group: Callable[[int], Sequence[Exchange]], *, sizes: Sequence[int] = (1, 2, 3), patience: timedelta = PATIENCE
) -> None:
    """Runs all checks in this process, with groups of each of ``sizes``.

    Args:
        make_group: makes so many connected exchanges, one per peer. Called again for every check.
        sizes: how many peers a group has.
        patience: how long a check may take.

    Raises:
        AssertionError: a check failed; the message names it.
    """
    for size in sizes:
        for peer_check in PEER_CHECKS:
            group = make_group(size)
            _together(peer_check.__name__, group, partial(_with_size, peer_check, size), patience)
            _close(group)
        for group_check in GROUP_CHECKS if size > 1 else ():
            group = make_group(size)
            group_check(group)
            _close(group)


def check_peer(make_exchange: Callable[[], Exchange], peer: int, size: int) -> None:
    """Runs what can be checked from one peer, while the others do the same.

    Args:
        make_exchange: this peer's exchange. Called again for every check.
        peer: our number, from 0. It only tells our data from the others'; an exchange may number peers as it likes.
        size: how many peers there are.

    Raises:
        AssertionError: a check failed.
    """
    for check in PEER_CHECKS:
        exchange = make_exchange()
        check(exchange, peer, size)
        exchange.close()


# -- what one peer sees ------------------------------------------------------------------------------------------------


def nothing_is_sent_before_the_start(exchange: Exchange, peer: int, size: int) -> None:
    """``publish`` and ``collect`` raise ExchangeError until ``start``, and ``collect`` while nothing is in flight."""
    plan = _plan()
    _refuses("publish() before start()", lambda: exchange.publish(random_update(plan, quantized=True)))
    _refuses("collect() before start()", exchange.collect)
    exchange.start(plan, _weights(plan, peer))
    _refuses("collect() with nothing in flight", exchange.collect)


def all_peers_start_with_the_weights_of_one(exchange: Exchange, peer: int, size: int) -> None:
    """Of the same one on every peer; the weights change in place."""
    plan = _plan()
    weights = _weights(plan, peer)
    pointers = [w.data_ptr() for w in weights]
    exchange.start(plan, weights)
    _expect([w.data_ptr() for w in weights] == pointers, "start() must change the weights in place")
    sources = [p for p in range(size) if all(map(torch.equal, weights, _weights(plan, p)))]
    _expect(len(sources) == 1, f"after start() peer {peer} has the weights of peers {sources}, not of one")
    _agree(exchange, plan, sources[0], "whose weights are everybody's")


def everybody_gets_every_update_in_the_same_order(exchange: Exchange, peer: int, size: int) -> None:
    """Signs and values, and the order is the same on every peer."""
    _expect(exchange.num_peers >= size, f"num_peers is {exchange.num_peers} in a group of {size}")
    plan = _plan()
    for quantized in (True, False):
        exchange.start(plan, _weights(plan, peer))
        for step in range(3):
            exchange.publish(_update(plan, peer, step, quantized))
            order = _senders(exchange.collect(), plan, step, quantized, size)
            _expect(sorted(order) == list(range(size)), f"step {step} brought the updates of peers {order}")
            exchange.publish(random_update(plan, quantized=quantized, seed=_number(order)))
            agreed = random_update(plan, quantized=quantized, seed=_number(order))
            _expect(all(same_update(u, agreed) for u in exchange.collect()), "peers got the updates in another order")


def publishing_may_run_one_step_ahead(exchange: Exchange, peer: int, size: int) -> None:
    """A step may be published before the one before it was collected."""
    plan = _plan()
    exchange.start(plan, _weights(plan, peer))
    exchange.publish(_update(plan, peer, 0, True))
    for step in range(1, 5):
        exchange.publish(_update(plan, peer, step, True))
        order = _senders(exchange.collect(), plan, step - 1, True, size)
        _expect(sorted(order) == list(range(size)), f"step {step - 1} brought the updates of peers {order}")
    _senders(exchange.collect(), plan, 4, True, size)
    _refuses("collect() with nothing in flight", exchange.collect)


def peers_may_have_little_or_nothing_to_say(exchange: Exchange, peer: int, size: int) -> None:
    """Updates in which some or all tensors are absent arrive too."""
    plan = _plan()
    exchange.start(plan, _weights(plan, peer))
    for step in range(size + 1):
        # In turn one peer says nothing, its neighbour only half; in the last step nobody says anything.
        spoken = [
            [] if step in (p, size) else range(len(plan)) if step != (p + 1) % size else range(0, len(plan), 2)
            for p in range(size)
        ]
        expected = [
            random_update(plan, quantized=True, present=[n in spoken[p] for n in range(len(plan))], seed=p + 1)
            for p in range(size)
        ]
        exchange.publish(expected[peer])
        got = exchange.collect()
        for p, update in enumerate(expected):
            # A peer that says nothing at all may as well be left out.
            there = any(same_update(update, g) for g in got) or not any(update.present)
            _expect(there, f"the update of peer {p}, which spoke about tensors {list(spoken[p])}, did not arrive")


def another_plan_may_follow(exchange: Exchange, peer: int, size: int) -> None:
    """``start`` may be called again, with other tensors."""
    for k in (3, 5):
        plan = _plan(k)
        weights = _weights(plan, peer + k)
        exchange.start(plan, weights)
        exchange.publish(_update(plan, peer, k, True))
        _expect(len(_senders(exchange.collect(), plan, k, True, size)) == size, f"a plan with k = {k} lost an update")


def traffic_is_counted(exchange: Exchange, peer: int, size: int) -> None:
    """In bytes, sent and received."""
    plan = _plan()
    exchange.start(plan, _weights(plan, peer))
    for step in range(2):
        sent, received = exchange.bytes_sent, exchange.bytes_received
        exchange.publish(_update(plan, peer, step, True))
        exchange.collect()
        if size > 1:
            _expect(exchange.bytes_sent > sent, "bytes_sent did not grow with an update")
            _expect(exchange.bytes_received > received, "bytes_received did not grow with the others' updates")
        else:
            _expect(exchange.bytes_received == 0, f"{exchange.bytes_received} bytes were received from nobody")


def what_is_closed_stays_closed(exchange: Exchange, peer: int, size: int) -> None:
    """Every call after ``close`` raises ExchangeError, but for ``close`` itself."""
    plan = _plan()
    exchange.start(plan, _weights(plan, peer))
    exchange.publish(_update(plan, peer, 0, True))
    exchange.collect()
    exchange.close()
    exchange.close()
    _refuses("start() after close()", lambda: exchange.start(plan, _weights(plan, peer)))
    _refuses("publish() after close()", lambda: exchange.publish(_update(plan, peer, 1, True)))
    _refuses("collect() after close()", exchange.collect)


PEER_CHECKS: Final[tuple[PeerCheck, ...]] = (
    nothing_is_sent_before_the_start,
    all_peers_start_with_the_weights_of_one,
    everybody_gets_every_update_in_the_same_order,
    publishing_may_run_one_step_ahead,
    peers_may_have_little_or_nothing_to_say,
    another_plan_may_follow,
    traffic_is_counted,
    what_is_closed_stays_closed,
)


# -- what takes a look at all peers ------------------------------------------------------------------------------------


def publishing_waits_for_nobody(group: Sequence[Exchange]) -> None:
    """A peer publishes while the others have not."""
    plan, first_is_out = _plan(), threading.Event()

    def run(exchange: Exchange, peer: int) -> None:
        exchange.start(plan, _weights(plan, peer))
        if peer:
            first_is_out.wait(PATIENCE.total_seconds())
        exchange.publish(_update(plan, peer, 0, True))
        first_is_out.set()
        _expect(len(exchange.collect()) == len(group), "an update got lost")

    _together("publishing_waits_for_nobody", group, run)


def a_peer_with_another_plan_is_noticed(group: Sequence[Exchange]) -> None:
    """At least one peer raises ExchangeError at the start."""
    noticed = []

    def run(exchange: Exchange, peer: int) -> None:
        plan = _plan(3 if peer else 4)
        try:
            exchange.start(plan, _weights(plan, peer))
        except ExchangeError:
            noticed.append(peer)

    _together("a_peer_with_another_plan_is_noticed", group, run)
    _expect(bool(noticed), "peers with different plans started together and none raised ExchangeError")


def who_leaves_keeps_nobody_waiting(group: Sequence[Exchange]) -> None:
    """The others go on without it, or get an ExchangeError."""
    plan = _plan()

    def run(exchange: Exchange, peer: int) -> None:
        exchange.start(plan, _weights(plan, peer))
        exchange.publish(_update(plan, peer, 0, True))
        exchange.collect()
        if peer == 0:
            exchange.close()
            return
        try:
            exchange.publish(_update(plan, peer, 1, True))
            order = _senders(exchange.collect(), plan, 1, True, len(group))
        except ExchangeError:
            return
        _expect(sorted(order) == list(range(1, len(group))), f"peer 0 left, and the updates of {order} came")

    _together("who_leaves_keeps_nobody_waiting", group, run)


GROUP_CHECKS: Final[tuple[GroupCheck, ...]] = (
    publishing_waits_for_nobody,
    a_peer_with_another_plan_is_noticed,
    who_leaves_keeps_nobody_waiting,
)


# -- inside ------------------------------------------------------------------------------------------------------------


def _plan(k: int = 3) -> TilePlan:
    return make_plan([ParamSpec(shape, torch.float32, torch.device("cpu"), 0, 16, k) for shape in _SHAPES], "padded")


def _weights(plan: TilePlan, peer: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(peer)
    return [torch.randn(s.shape, generator=generator) for s in plan.specs]


def _update(plan: TilePlan, peer: int, step: int, quantized: bool) -> CompressedUpdate:
    return random_update(plan, quantized=quantized, seed=1 + peer + 1000 * step)


def _senders(updates: Sequence[CompressedUpdate], plan: TilePlan, step: int, quantized: bool, size: int) -> list[int]:
    """Whose updates of ``step`` these are, in order."""
    senders = []
    for update in updates:
        found = [p for p in range(size) if same_update(update, _update(plan, p, step, quantized))]
        _expect(len(found) == 1, f"step {step} brought an update that no peer published then")
        senders += found
    return senders


def _number(order: Sequence[int]) -> int:
    """A number that is different for every order of peers."""
    number = 0
    for peer in order:
        number = number * len(order) + peer
    return number


def _agree(exchange: Exchange, plan: TilePlan, number: int, what: str) -> None:
    """Fails unless all peers call this with the same ``number``."""
    mine = random_update(plan, quantized=True, seed=number)
    exchange.publish(mine)
    _expect(all(same_update(mine, u) for u in exchange.collect()), f"the peers do not agree on {what}")


def _expect(condition: bool, message: str) -> None:
    # Not an assert statement: the suite works under python -O too.
    if not condition:
        raise AssertionError(message)


def _refuses(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ExchangeError:
        return
    raise AssertionError(f"{what} must raise ExchangeError")


def _with_size(check: PeerCheck, size: int, exchange: Exchange, peer: int) -> None:
    check(exchange, peer, size)


def _together(
    name: str, group: Sequence[Exchange], run: Callable[[Exchange, int], None], patience: timedelta = PATIENCE
) -> None:
    """Runs ``run(exchange, peer)`` for all peers at once and raises the first error of any."""
    errors: list[Exception] = []

    def guarded(exchange: Exchange, peer: int) -> None:
        try:
            run(exchange, peer)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(e, p), daemon=True) for p, e in enumerate(group)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience.total_seconds())
    if errors:
        raise AssertionError(f"{name}: {errors[0]}") from errors[0]
    _expect(not any(t.is_alive() for t in threads), f"{name}: a peer hangs")


def _close(group: Sequence[Exchange]) -> None:
    for exchange in group:
        exchange.close()
