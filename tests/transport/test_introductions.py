"""Host and joiner tell each other what they speak: what cannot train together is refused, before training.

Peers of before introductions say nothing, and do not know the question.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from distro_optim.comm.iroh import introduction
from distro_optim.comm.iroh.endpoint import Node
from distro_optim.comm.iroh.introduction import INTRODUCTION_ALPN, Introductions, VersionDesk, introduce
from distro_optim.comm.loop import LoopThread
from distro_optim.errors import ExchangeError, JoinRefusedError, ProtocolError
from distro_optim.protocol import MAX_BYTES, OURS, SILENT, Speaks, common, why_apart
from distro_optim.strategy.network import coordinating, joining
from distro_optim.strategy.network.runtime import Runtime
from distro_optim.strategy.port import Note
from runtime.live import LOOPBACK, config, served_run

pytestmark = [pytest.mark.waiting]
SECONDS = 30.0

OLD, NEW, NEWEST = Speaks(1, 1, "0.1.0"), Speaks(1, 2, "0.2.0"), Speaks(2, 3, "0.3.0")


@pytest.mark.parametrize(
    ("one", "other", "by"),
    [(OLD, OLD, 1), (OLD, NEW, 1), (NEW, NEWEST, 2), (OLD, NEWEST, None), (SILENT, NEW, 1), (SILENT, NEWEST, None)],
)
def test_two_train_by_the_newest_protocol_that_both_speak(one: Speaks, other: Speaks, by: int | None) -> None:
    assert common(one, other) == common(other, one) == by
    assert (why_apart(one, other, us="us", them="them") is None) == (by is not None)


def test_the_one_that_is_behind_has_to_upgrade_whichever_side_says_so() -> None:
    advice = "has to upgrade to distro_optim 0.3.0 (pip install 'distro-optim==0.3.0')"
    here = why_apart(OLD, NEWEST, us="this machine", them="the host of the run")
    there = why_apart(NEWEST, OLD, us="this host", them="peer 1234abcd")
    assert here == (
        "this machine has distro_optim 0.1.0 (protocol 1), the host of the run has distro_optim 0.3.0 (protocols 2 to "
        f"3), and they cannot train together: this machine {advice}"
    )
    assert there is not None
    assert there.endswith(f"peer 1234abcd {advice}")


def test_a_version_that_cannot_be_typed_is_not_offered_for_typing() -> None:
    there = Speaks.decode(b'{"protocols": [2, 2], "version": "1\\u001b[2J\\u0027; reboot #"}')
    reason = why_apart(OLD, there, us="this machine", them="the host")
    assert reason is not None
    assert reason.isprintable()
    assert "pip" not in reason


def test_what_is_said_is_read_back_and_what_later_versions_add_is_passed_over() -> None:
    assert Speaks.decode(NEWEST.encode()) == NEWEST
    assert Speaks.decode(b'{"protocols": [2, 3], "version": "0.3.0", "wishes": {"a": []}}') == NEWEST


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"[" * 1000,
        b"{}",
        b'{"version": "1"}',
        b'{"version": 1, "protocols": [1, 1]}',
        b'{"version": "1", "protocols": [2, 1]}',
        b'{"version": "1", "protocols": [0, 1]}',
        b'{"version": "1", "protocols": [true, 1]}',
        b'{"version": "1", "protocols": [1, 1e9]}',
        b'{"version": "1", "protocols": [1, 99999999999]}',
        b'{"version": "' + b"1" * MAX_BYTES + b'", "protocols": [1, 1]}',
    ],
)
def test_nonsense_is_no_introduction(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Speaks.decode(data)


# -- what a host makes of it -------------------------------------------------------------------------------------------


def test_another_version_that_works_is_told_once() -> None:
    told: list[str] = []
    desk = VersionDesk(told.append, NEW)
    for _ in range(2):
        desk.hear(b"a" * 32, NEW)
        desk.hear(b"b" * 32, OLD)
        assert desk.why_not(b"a" * 32) is desk.why_not(b"b" * 32) is None
    assert told == [
        "peer 62626262 has distro_optim 0.1.0 (protocol 1), here is distro_optim 0.2.0 (protocols 1 to 2): they train "
        "together"
    ]


def test_who_says_nothing_is_of_the_first_version() -> None:
    told: list[str] = []
    assert VersionDesk(told.append, NEW).why_not(b"a" * 32) is None
    desk = VersionDesk(told.append, NEWEST)
    for _ in range(2):
        assert "has to upgrade to distro_optim 0.3.0" in str(desk.why_not(b"a" * 32))
    assert len(told) == 1


def test_a_crowd_is_forgotten_and_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(introduction, "MAX_PEERS", 10)
    told: list[str] = []
    desk = VersionDesk(told.append, NEWEST)
    for number in range(100):
        desk.hear(number.to_bytes(32, "big"), NEW)
    assert len(desk._said) == len(told) == 10


# -- over the network --------------------------------------------------------------------------------------------------


def on_loop(work: Coroutine[Any, Any, None], loop: LoopThread) -> None:
    try:
        loop.run(work, SECONDS)
    finally:
        loop.stop()


@pytest.mark.slow
@pytest.mark.parametrize("question", [b"", b"{}", bytes(20_000)])
def test_a_host_answers_introductions_and_only_those(question: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopThread("test-introductions")

    async def work() -> None:
        host, guest, older = (Node(loop=loop, **LOOPBACK) for _ in range(3))
        for node in (host, older):
            await node.bind()
        host.set_allowed([])  # nobody who introduces himself is in the run yet
        desk = VersionDesk(lambda text: None, NEWEST)
        Introductions(host, desk)
        assert await introduce(guest, host.addr(), NEW) == NEWEST
        assert desk._said == {guest.endpoint_id: NEW}
        assert await introduce(guest, older.addr()) == SILENT
        connection = await guest.connect(host.addr(), INTRODUCTION_ALPN)
        send, recv = await connection.open_bi()
        await send.write(question)
        await send.finish()
        async with asyncio.timeout(SECONDS):
            try:
                assert await recv.read_to_end(100) == b""
            except ExchangeError:
                pass
            await connection.closed()
        nowhere = host.addr()
        for node in (host, older):
            await node.aclose()
        monkeypatch.setattr(introduction, "DIAL_SECONDS", 0.1)
        assert await introduce(guest, nowhere) is None
        await guest.aclose()

    on_loop(work(), loop)


@contextmanager
def hosted() -> Iterator[Runtime]:
    host = Runtime.connect(config=config(min_peers=2), **LOOPBACK)
    host.start()
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def a_run() -> Iterator[Runtime]:
    with hosted() as host:
        yield host


def hosts_speak(monkeypatch: pytest.MonkeyPatch, speaks: Speaks) -> None:
    monkeypatch.setattr(coordinating, "VersionDesk", lambda tell: VersionDesk(tell, speaks))


def joiners_speak(monkeypatch: pytest.MonkeyPatch, speaks: Speaks) -> None:
    monkeypatch.setattr(joining, "OURS", speaks)
    monkeypatch.setattr(joining, "introduce", lambda node, host: introduce(node, host, speaks))


def joined(ticket: str | None) -> Runtime:
    friend = Runtime.connect(ticket, **LOOPBACK)
    try:
        friend.look()
        friend.start()
    finally:
        friend.close()
    return friend


def notes(host: Runtime) -> list[str]:
    return [event.text for event in host.take_events() if isinstance(event, Note)]


@pytest.mark.slow
def test_of_the_same_version_nothing_is_said(a_run: Runtime) -> None:
    joined(a_run.ticket)
    assert notes(a_run) == []


@pytest.mark.slow
def test_a_newer_joiner_trains_with_an_older_host_and_the_host_says_so(
    a_run: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    joiners_speak(monkeypatch, Speaks(1, OURS.newest + 1, "9.0"))
    joined(a_run.ticket)
    (note,) = notes(a_run)
    assert "has distro_optim 9.0" in note


def test_a_joiner_that_is_too_new_asks_for_a_newer_host_and_never_joins(
    a_run: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    joiners_speak(monkeypatch, Speaks(8, 9, "9.0"))
    with pytest.raises(JoinRefusedError, match=r"the host of the run has to upgrade to distro_optim 9\.0 "):
        joined(a_run.ticket)
    (note,) = notes(a_run)
    assert "this host has to upgrade to distro_optim 9.0" in note


def test_a_joiner_that_is_too_old_is_told_to_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts_speak(monkeypatch, Speaks(8, 9, "9.0"))
    with hosted() as host:
        with pytest.raises(JoinRefusedError, match=r"this machine has to upgrade to distro_optim 9\.0 \(pip install"):
            joined(host.ticket)
        (note,) = notes(host)
        assert "has to upgrade" in note


@pytest.mark.slow
def test_a_peer_of_before_introductions_is_let_in_as_long_as_its_protocol_is_spoken(
    a_run: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def says_nothing(node: Node, host: object) -> None:
        return None

    monkeypatch.setattr(joining, "introduce", says_nothing)
    joined(a_run.ticket)


def test_a_peer_of_before_introductions_is_refused_where_its_protocol_is_not_spoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def says_nothing(node: Node, host: object) -> None:
        return None

    hosts_speak(monkeypatch, Speaks(8, 9, "9.0"))
    monkeypatch.setattr(joining, "introduce", says_nothing)
    with hosted() as host:
        with pytest.raises(JoinRefusedError, match=r"they cannot train together: peer .* has to upgrade"):
            joined(host.ticket)
        (note,) = notes(host)
        assert "distro_optim of an older version (protocol 1)" in note


@pytest.mark.slow
def test_a_host_of_before_introductions_is_joined_as_long_as_its_protocol_is_spoken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with served_run(config(min_peers=2), "older") as ticket:  # as in versions before: it does not know the question
        joined(ticket)
        joiners_speak(monkeypatch, NEWEST)
        with pytest.raises(JoinRefusedError, match=r"the host of the run has to upgrade to distro_optim 0\.3\.0"):
            joined(ticket)
