"""Whatever valid messages strangers send, tables stay within their bounds and the rules hold."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distro_optim.comm.iroh.gossip.config import GossipConfig
from distro_optim.comm.iroh.gossip.events import (
    Deliver,
    Event,
    JoinPeers,
    NeighborUp,
    Offence,
    PeerDisconnected,
    Publish,
    Received,
    Schedule,
    Send,
    ShuffleTimer,
    TimerExpired,
    UpdatePeerData,
)
from distro_optim.comm.iroh.gossip.messages import (
    Disconnect,
    ForwardJoin,
    Gossip,
    Graft,
    IHave,
    Join,
    Message,
    Neighbor,
    PeerInfo,
    Prune,
    Shuffle,
    ShuffleReply,
    encode_message,
    message_id,
)
from distro_optim.comm.iroh.gossip.peer_data import MAX_PEER_DATA
from distro_optim.comm.iroh.gossip.topic import TopicState
from gossip.strategies import messages

pytestmark = pytest.mark.waiting


ME = b"\x00" * 32
PEERS = [bytes([i]) * 32 for i in range(12)]
SMALL = GossipConfig(
    active_view_capacity=3,
    passive_view_capacity=4,
    pending_capacity=3,
    seen_capacity=4,
    cache_capacity=6,
    missing_capacity=5,
    missing_per_peer=3,
)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Received, st.sampled_from(PEERS), messages(st.sampled_from(PEERS))),
    st.builds(PeerDisconnected, st.sampled_from(PEERS)),
    st.builds(Publish, st.binary(max_size=3), st.booleans()),
    st.builds(JoinPeers, st.lists(st.sampled_from(PEERS), max_size=3).map(tuple)),
    st.builds(UpdatePeerData, st.binary(max_size=20)),
)


def peer(i: int) -> bytes:
    return i.to_bytes(2, "big") * 16


def state(config: GossipConfig = SMALL) -> TopicState:
    return TopicState(ME, config, random.Random(1))


def neighbors(topic: TopicState, count: int) -> list[bytes]:
    """Makes ``count`` peers neighbours."""
    peers = [peer(1000 + i) for i in range(count)]
    for other in peers:
        topic.handle(Received(other, Join()), 0.0)
    assert topic.neighbors == tuple(peers)
    return peers


def sent(actions: list[Any], kind: type[Message]) -> list[tuple[bytes, Message]]:
    return [(to, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, kind) for to in a.peers]


def check_bounds(topic: TopicState, config: GossipConfig) -> None:
    m, b = topic.membership, topic.broadcast
    assert len(m.active) <= config.active_view_capacity
    assert len(m.passive) <= config.passive_view_capacity
    assert not m.active.keys() & m.passive.keys()
    assert ME not in {*m.active, *m.passive, *m.pending}
    assert m._alive <= m.passive.keys()
    assert len(m._data) <= len(m.active) + len(m.passive) + len(m.pending)
    assert not b.eager.keys() & b.lazy.keys()
    assert {*b.eager, *b.lazy} == set(m.active)
    assert len(b._received) <= config.seen_capacity
    assert b._cache_bytes == sum(len(message.content) for _, message in b._cache.values())
    assert b._cache_bytes <= config.cache_capacity
    assert len(b._missing) <= config.missing_capacity
    assert all(0 < held <= config.missing_per_peer for held in b._missing_by_peer.values())
    assert sum(map(len, b._missing.values())) == sum(b._missing_by_peer.values())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.floats(0, 2), st.booleans()), max_size=40))
def test_any_sequence_of_events_keeps_every_bound_and_every_invariant(
    steps: list[tuple[Event, float, bool]],
) -> None:
    topic = state()
    now = 0.0
    timers: list[Schedule] = []
    for event, wait, run_timer in steps:
        now += wait
        actions = topic.handle(event, now)
        if run_timer and timers:
            actions += topic.handle(TimerExpired(timers.pop(0).timer), now)
        timers += [a for a in actions if isinstance(a, Schedule)]
        check_bounds(topic, SMALL)
        for action in actions:
            if isinstance(action, Send):
                assert action.peers
                assert ME not in action.peers
                assert len(encode_message(action.message)) < SMALL.max_message_size


@pytest.mark.slow
def test_ten_thousand_newcomers_leave_no_more_than_the_views() -> None:
    topic = state()
    for i in range(10_000):
        topic.handle(Received(peer(i % 5000 + 1), Join(b"somewhere")), i / 100)
    check_bounds(topic, SMALL)


def test_ten_thousand_rumours_of_peers_make_us_ask_only_a_few_at_a_time() -> None:
    topic = state()
    neighbor = neighbors(topic, 1)[0]
    asked = [
        action
        for i in range(1, 10_000)
        for action in topic.handle(Received(neighbor, ForwardJoin(PeerInfo(peer(i)), 0)), 0.0)
    ]
    # The neighbour itself waits for an answer too, it counts as asked.
    assert len(sent(asked, Neighbor)) == SMALL.pending_capacity - 1
    check_bounds(topic, SMALL)


def test_a_request_that_is_never_answered_is_forgotten_in_time() -> None:
    topic = state()
    neighbor = neighbors(topic, 1)[0]
    topic.handle(Received(neighbor, ForwardJoin(PeerInfo(peer(1)), 0)), 10.0)
    assert peer(1) in topic.membership.pending
    from distro_optim.comm.iroh.gossip.events import RequestTimer

    topic.handle(TimerExpired(RequestTimer(peer(1))), 10.0 + SMALL.neighbor_request_timeout)
    assert peer(1) not in topic.membership.pending


def test_a_million_announcements_that_never_come_fill_only_the_share_of_one_peer() -> None:
    topic = state()
    liar = neighbors(topic, 1)[0]
    for i in range(100):
        entries = tuple((peer(i)[:16] + peer(j)[:16], 0) for j in range(100))
        topic.handle(Received(liar, IHave(entries)), 0.0)
    assert topic.broadcast._missing_by_peer == {liar: SMALL.missing_per_peer}
    check_bounds(topic, SMALL)


def test_a_payload_announced_by_a_liar_is_still_fetched_from_an_honest_peer() -> None:
    topic = state()
    liar, honest = neighbors(topic, 2)
    id_ = message_id(b"true")
    actions = topic.handle(Received(liar, IHave(((id_, 0),))), 0.0)
    topic.handle(Received(honest, IHave(((id_, 3),))), 0.0)
    asked: list[bytes] = []
    for _ in range(3):
        timer = [a for a in actions if isinstance(a, Schedule)]
        actions = topic.handle(TimerExpired(timer[-1].timer), 1.0) if timer else []
        asked += [to for to, _ in sent(actions, Graft)]
    assert asked == [liar, honest]


def test_a_stranger_that_prunes_or_grafts_changes_nothing() -> None:
    topic = state()
    friend = neighbors(topic, 1)[0]
    for message in (Prune(), Graft(None, 0)):
        topic.handle(Received(peer(7), message), 0.0)
    assert list(topic.broadcast.eager) == [friend]
    assert not topic.broadcast.lazy


def test_an_id_that_is_not_the_hash_of_its_content_is_an_offence_and_nothing_is_delivered() -> None:
    topic = state()
    liar = neighbors(topic, 2)[0]
    actions = topic.handle(Received(liar, Gossip(b"\x01" * 32, b"forged", 0)), 0.0)
    assert [type(action) for action in actions] == [Offence]


def test_a_round_of_65535_is_passed_on_without_overflow() -> None:
    topic = state()
    sender, other = neighbors(topic, 2)
    actions = topic.handle(Received(sender, Gossip(message_id(b"x"), b"x", 0xFFFF)), 0.0)
    assert sent(actions, Gossip) == [(other, Gossip(message_id(b"x"), b"x", 0xFFFF))]


def test_a_walk_of_65535_hops_is_cut_to_our_own_length() -> None:
    topic = state()
    first, second, _ = neighbors(topic, 3)
    for message in (ForwardJoin(PeerInfo(peer(1)), 0xFFFF), Shuffle(second, (), 0xFFFF)):
        ((_, forwarded),) = sent(topic.handle(Received(first, message), 0.0), type(message))
        assert isinstance(forwarded, ForwardJoin | Shuffle)
        assert forwarded.ttl < 6


def test_peer_data_larger_than_its_bound_is_neither_kept_nor_passed_on() -> None:
    topic = state()
    neighbors(topic, 2)
    actions = topic.handle(Received(peer(1), Join(bytes(MAX_PEER_DATA + 1))), 0.0)
    assert all(
        message.peer.data is None for _, message in sent(actions, ForwardJoin) if isinstance(message, ForwardJoin)
    )
    assert not topic.membership._data


def test_hearsay_does_not_replace_what_a_neighbour_said_of_itself() -> None:
    topic = state()
    topic.handle(Received(peer(1), Join(b"home")), 0.0)
    topic.handle(Received(peer(2), ShuffleReply((PeerInfo(peer(1), b"the liar's"),))), 0.0)
    assert topic.membership._data[peer(1)] == b"home"


def test_a_shuffle_with_a_hundred_peers_is_answered_with_eight() -> None:
    config = GossipConfig()
    topic = state(config)
    friend = neighbors(topic, 1)[0]
    nodes = tuple(PeerInfo(peer(i)) for i in range(1, 101))
    actions = topic.handle(Received(friend, Shuffle(friend, nodes, 0)), 0.0)
    ((to, reply),) = sent(actions, ShuffleReply)
    assert to == friend
    assert isinstance(reply, ShuffleReply)
    assert len(reply.nodes) == 8


def test_a_shuffle_answer_with_much_peer_data_stays_below_the_message_size() -> None:
    topic = state(GossipConfig(max_message_size=512))
    friend = neighbors(topic, 1)[0]
    nodes = tuple(PeerInfo(peer(i), bytes(200)) for i in range(1, 9))
    actions = topic.handle(Received(friend, Shuffle(friend, nodes, 0)), 0.0)
    ((_, reply),) = sent(actions, ShuffleReply)
    assert 0 < len(encode_message(reply)) < 512


def test_our_own_messages_sent_back_to_us_do_nothing() -> None:
    topic = state()
    friend = neighbors(topic, 1)[0]
    assert topic.handle(Received(friend, Shuffle(ME, (PeerInfo(peer(1)),), 0)), 0.0) == []
    assert topic.handle(Received(friend, ForwardJoin(PeerInfo(ME), 0)), 0.0) == []
    assert topic.handle(Received(ME, Join()), 0.0) == []


def test_the_same_content_is_delivered_once_and_broadcast_once() -> None:
    topic = state()
    first, second = neighbors(topic, 2)
    gossip = Gossip(message_id(b"x"), b"x", 0)
    delivered = [
        action
        for sender in (first, second, first)
        for action in topic.handle(Received(sender, gossip), 0.0)
        if isinstance(action, Deliver)
    ]
    assert len(delivered) == 1
    assert topic.handle(Publish(b"x"), 0.0) == []


def test_what_is_broadcast_before_there_is_a_neighbour_goes_to_the_first_one() -> None:
    topic = state()
    topic.handle(Publish(b"early"), 0.0)
    actions = topic.handle(Received(peer(1), Join()), 1.0)
    kinds = [type(a.message) for a in actions if isinstance(a, Send)]
    assert kinds == [Neighbor, Gossip]
    assert any(isinstance(a, NeighborUp) for a in actions)


def test_a_low_priority_request_is_refused_with_other_peers_when_the_view_is_full() -> None:
    topic = state()
    friends = neighbors(topic, SMALL.active_view_capacity)
    actions = topic.handle(Received(peer(1), Neighbor(high=False)), 0.0)
    assert [to for to, _ in sent(actions, Disconnect)] == [peer(1)]
    ((_, reply),) = sent(actions, ShuffleReply)
    assert isinstance(reply, ShuffleReply)
    assert {node.id for node in reply.nodes} == set(friends)
    assert topic.neighbors == tuple(friends)


@pytest.mark.parametrize("alive", [True, False])
def test_a_neighbour_that_leaves_is_remembered_only_if_it_lives(alive: bool) -> None:
    topic = state()
    friend = neighbors(topic, 2)[0]
    topic.handle(Received(friend, Disconnect(alive)), 0.0)
    assert (friend in topic.membership.passive) == alive
    topic.handle(PeerDisconnected(friend), 0.0)
    assert (friend in topic.membership.passive) == alive


def test_announcements_never_exceed_a_message() -> None:
    config = GossipConfig()
    topic = state(config)
    lazy, sender = neighbors(topic, 2)
    topic.handle(Received(lazy, Prune()), 0.0)
    actions = []
    for i in range(300):
        content = i.to_bytes(2, "big")
        actions += topic.handle(Received(sender, Gossip(message_id(content), content, 0xFFFF)), 0.0)
    announced = [message for to, message in sent(actions, IHave) if to == lazy]
    assert [len(m.entries) for m in announced if isinstance(m, IHave)] == [116, 116]
    assert all(len(encode_message(message)) < config.max_message_size for message in announced)


def test_in_a_swarm_of_few_there_is_room_for_all_of_them_and_one_more_and_for_no_stranger_beyond() -> None:
    config = replace(SMALL, pushed_by_author=6)
    topic = state(config)
    topic.set_others(6)
    friends = neighbors(topic, 7)
    topic.handle(Received(peer(1), Join()), 0.0)
    assert len(topic.neighbors) == 7
    assert len({*topic.neighbors} & {*friends}) == 6


def test_when_a_swarm_has_become_large_the_surplus_of_neighbours_goes_one_by_one() -> None:
    config = replace(SMALL, pushed_by_author=6)
    topic = state(config)
    topic.set_others(6)
    neighbors(topic, 6)
    topic.set_others(7)
    counts = []
    for look in range(5):
        topic.handle(TimerExpired(ShuffleTimer()), 60.0 * look)
        counts.append(len(topic.neighbors))
    assert counts == [5, 4, 3, 3, 3]
    check_bounds(topic, config)
