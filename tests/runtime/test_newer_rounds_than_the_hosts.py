"""Whom a host that starts again believes about how far the run is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.server.host import RunHost, restartable
from distro_optim.coordinator.types import Coordinator, CoordinatorProgress, NodeIdentity, RunState
from distro_optim.errors import ProtocolError
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.network.newest import (
    Newest,
    NewestSearch,
    claim_of,
    keep_key,
    kept_key,
    newest_live,
    read_claim,
    state_bytes,
)
from distro_optim.strategy.rounds.trust.saved_step import SavedStep

RUN = "run"
KEYS = [SecretKey(bytes(31) + bytes([number])) for number in range(1, 6)]
FRIEND, LATER, STRANGER, NOW, HOST = KEYS


def state(step: int, run_state: RunState = RunState.ROUND_TRAIN, run_id: str = RUN) -> Coordinator:
    begins = RunConfig(total_steps=1000, global_batch_size=8).coordinator_state(run_id)
    return replace(begins, run_state=run_state, progress=CoordinatorProgress(step=step))


def saved(step: int, standing: frozenset[bytes] = frozenset()) -> SavedStep:
    return SavedStep(RUN, 3, step, step * 8, standing)


def test_of_those_with_standing_the_one_that_is_furthest_counts() -> None:
    answers = [
        (FRIEND.public, Newest(state_bytes(state(12)))),
        (LATER.public, Newest(state_bytes(state(14)))),
        (STRANGER.public, Newest(state_bytes(state(900)))),
    ]
    standing = {FRIEND.public, LATER.public}
    found = newest_live(answers, RUN, standing, 10)
    assert found is not None
    assert found.progress.step == 14
    assert newest_live(answers, RUN, standing, 15) is None
    assert newest_live(answers, RUN, set(), 10) is None


@pytest.mark.parametrize(
    "answer",
    [
        Newest(),
        Newest(b"\xff" * 20),
        Newest(state_bytes(state(20, run_id="other"))),
        Newest(state_bytes(state(20, RunState.FINISHED))),
    ],
)
def test_what_is_no_state_of_the_run_that_goes_on_counts_for_nothing(answer: Newest) -> None:
    assert newest_live([(FRIEND.public, answer)], RUN, {FRIEND.public}, 1) is None


def test_a_claim_is_of_one_peer_in_one_run() -> None:
    claim = claim_of(saved(7), FRIEND, NOW.public)
    assert read_claim(claim, RUN, NOW.public) == (FRIEND.public, saved(7))
    for run, now in (("other", NOW.public), (RUN, STRANGER.public)):
        with pytest.raises(ProtocolError):
            read_claim(claim, run, now)
    for changed in (claim[:-1], claim + b"\0", b"", claim[:40] + bytes([claim[40] ^ 1]) + claim[41:]):
        with pytest.raises(ProtocolError):
            read_claim(changed, RUN, NOW.public)


def test_a_peer_keeps_the_key_that_it_had_where_only_its_owner_reads_it(tmp_path: Path) -> None:
    assert kept_key(tmp_path) is kept_key(None) is None
    for key in (FRIEND, LATER):
        keep_key(tmp_path / "new", key)
        found = kept_key(tmp_path / "new")
        assert found is not None
        assert found.public == key.public
    assert (tmp_path / "new" / "peer.key").stat().st_mode & 0o077 == 0
    (tmp_path / "new" / "peer.key").write_bytes(b"short")
    assert kept_key(tmp_path / "new") is None


def searched(claims: dict[SecretKey, bytes | None]) -> tuple[RunHost, list[str]]:
    """A host at step 10 that these clients join, each with its claim, or without an answer."""
    host = RunHost(restartable(state(10, RunState.WAITING_FOR_MEMBERS), 0))
    notes: list[str] = []
    by_key = {key.public: None if claim is None else Newest(claim=claim) for key, claim in claims.items()}

    async def ask(peer: bytes) -> Newest | None:
        return by_key[peer]

    async def search() -> None:
        clients = [NodeIdentity.from_single_key(key.public) for key in claims]
        for client in clients:
            host._join(client, RUN, 0)
        one = NewestSearch(
            saved(10, frozenset({FRIEND.public, LATER.public})),
            ask=ask,
            adopt=lambda found, client: host.go_on_from(found.progress, client),
            on_note=notes.append,
        )
        assert not one.may_begin(clients)
        await asyncio.gather(*one._asked.values())
        assert one.may_begin(clients)
        one.close()

    asyncio.run(search())
    return host, notes


def test_the_run_begins_at_the_newest_checkpoint_with_its_owner_as_the_first_of_the_list() -> None:
    first, second, third = KEYS[2:]
    host, notes = searched(
        {
            first: None,
            second: claim_of(saved(12), FRIEND, second.public),
            third: claim_of(saved(14), LATER, third.public),
        }
    )
    assert host.state.progress == CoordinatorProgress(epoch=3, step=14, epoch_start_data_index=14 * 8)
    assert [client.signer for client in host.pending] == [third.public, second.public, first.public]
    assert all("the run goes on from that one" in note for note in notes)


def test_a_checkpoint_of_a_peer_that_was_not_there_then_does_not_count_and_that_is_said() -> None:
    host, notes = searched({NOW: claim_of(saved(500), STRANGER, NOW.public)})
    assert host.state.progress.step == 10
    assert "its own checkpoint counts" in notes[0]


def test_a_claim_of_another_older_or_beyond_the_end_changes_nothing() -> None:
    stolen = claim_of(saved(20), FRIEND, STRANGER.public)
    older = claim_of(saved(9), FRIEND, LATER.public)
    beyond = claim_of(saved(1_000_000), FRIEND, HOST.public)
    host, notes = searched({NOW: stolen, LATER: older, HOST: beyond})
    assert host.state.progress.step == 10
    assert not notes
