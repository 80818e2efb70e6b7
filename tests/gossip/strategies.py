"""Hypothesis strategies for gossip messages."""

from __future__ import annotations

from hypothesis import strategies as st

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
    message_id,
)

U16 = st.integers(0, 0xFFFF)
DATA = st.none() | st.binary(max_size=40)


def messages(ids: st.SearchStrategy[bytes]) -> st.SearchStrategy[Message]:
    """Any message a peer can send. Peers and payload ids come from ``ids``; half of the payload ids are true."""
    info = st.builds(PeerInfo, ids, DATA)
    infos = st.lists(info, max_size=6).map(tuple)
    true_gossip = st.builds(
        lambda content, round_: Gossip(message_id(content), content, round_), st.binary(max_size=3), st.none() | U16
    )
    return st.one_of(
        st.builds(Join, DATA),
        st.builds(ForwardJoin, info, U16),
        st.builds(Shuffle, ids, infos, U16),
        st.builds(ShuffleReply, infos),
        st.builds(Neighbor, st.booleans(), DATA),
        st.builds(Disconnect, st.booleans()),
        true_gossip,
        st.builds(Gossip, ids, st.binary(max_size=3), st.none() | U16),
        st.just(Prune()),
        st.builds(Graft, st.none() | ids, U16),
        st.builds(IHave, st.lists(st.tuples(ids, U16), max_size=6).map(tuple)),
    )
