"""A swarm in bad weather loses what it should, keeps the rest, and keeps its promises when the weather is good."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import pytest
from typing_extensions import override

from distro_optim.comm.swarm import Channel, Swarm
from distro_optim.errors import BlobUnavailableError
from distro_optim.testing.swarm import MemoryNetwork
from distro_optim.testing.swarm_checks import CHECKS, SwarmArena
from distro_optim.testnet.weather import CLEAR, Weather, WeatheredSwarm, WeatherFile, write_weather
from swarm.test_memory_swarm import MemoryArena

pytestmark = pytest.mark.waiting


class WeatheredArena(MemoryArena):
    @override
    async def make(self, *, allowed: Iterable[bytes] | None = None, queued_per_sender: int | None = None) -> Swarm:
        inner = await super().make(allowed=allowed, queued_per_sender=queued_per_sender)
        return WeatheredSwarm(inner, lambda: CLEAR, random.Random(1))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_in_clear_weather_every_promise_is_kept(check: Callable[[SwarmArena], Awaitable[None]]) -> None:
    async def run() -> None:
        async with WeatheredArena() as arena:
            await check(arena)

    asyncio.run(run())


class Peers:
    """Some peers under one sky."""

    def __init__(self, count: int) -> None:
        network = MemoryNetwork(seed=1)
        self.weather = CLEAR
        self.swarms = [WeatheredSwarm(network.join(), lambda: self.weather, random.Random(n)) for n in range(count)]

    def __getitem__(self, number: int) -> WeatheredSwarm:
        return self.swarms[number]


def test_thirty_per_cent_are_lost_by_each_peer_on_its_own() -> None:
    async def run() -> tuple[set[bytes], set[bytes], int]:
        peers = Peers(3)
        peers.weather = Weather(loss=0.3)
        for number in range(250):
            await peers[0].announce(b"%d" % number)
        heard: list[set[bytes]] = [set(), set()]

        async def listen(swarm: WeatheredSwarm, words: set[bytes]) -> None:
            async for announcement in swarm.announcements():
                words.add(announcement.data)

        listening = [asyncio.create_task(listen(peers[n + 1], heard[n])) for n in range(2)]
        while any(peers[n + 1].lost + len(heard[n]) < 250 for n in range(2)):
            await asyncio.sleep(0)
        for task in listening:
            task.cancel()
        return heard[0], heard[1], peers[1].lost

    one, other, lost = asyncio.run(asyncio.wait_for(run(), 30))
    assert one != other
    assert 40 < lost < 120
    assert all(130 < len(words) < 210 for words in (one, other))


def test_a_partition_stops_announcements_on_all_channels_and_fetches_until_it_heals() -> None:
    async def run() -> None:
        peers = Peers(3)
        alice, bob, carol = peers.swarms
        ticket = await alice.publish(b"data", "tag")
        peers.weather = Weather(groups=((alice.peer_id,),))
        with pytest.raises(BlobUnavailableError, match="cut between us"):
            await bob.fetch(ticket, max_size=100)
        await alice.announce(b"unheard")
        await carol.announce(b"heard")
        assert (await anext(bob.announcements())).data == b"heard"
        await alice.announce(b"unheard", channel=Channel.OWN_KIND)
        await carol.announce(b"heard", channel=Channel.OWN_KIND)
        assert (await anext(bob.announcements(Channel.OWN_KIND))).data == b"heard"
        assert bob.cut == 3
        peers.weather = CLEAR
        await alice.announce(b"again")
        assert (await anext(bob.announcements())).data == b"again"
        assert await bob.fetch(ticket, max_size=100) == b"data"

    asyncio.run(run())


def test_a_blob_is_fetched_from_a_provider_on_the_own_side() -> None:
    async def run() -> None:
        peers = Peers(3)
        alice, bob, carol = peers.swarms
        ticket = await alice.publish(b"data", "tag")
        assert await carol.fetch(ticket, max_size=100, tag="kept") == b"data"
        peers.weather = Weather(groups=((alice.peer_id,),))
        assert await bob.fetch(ticket, [carol.peer_id], max_size=100) == b"data"

    asyncio.run(run())


def test_the_weather_changes_for_all_who_look_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weather"
    weather = WeatherFile(path)
    assert weather() == CLEAR
    bad = Weather(loss=0.25, groups=((b"a" * 32, b"b" * 32), (b"c" * 32,)))
    write_weather(path, bad)
    assert weather() == bad
    assert weather().are_connected(b"a" * 32, b"b" * 32)
    assert not weather().are_connected(b"a" * 32, b"c" * 32)
    assert not weather().are_connected(b"a" * 32, b"d" * 32)
    write_weather(path, CLEAR)
    assert weather() == CLEAR
    path.unlink()
    assert weather() == CLEAR
