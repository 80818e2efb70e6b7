"""What a client decides without any I/O: whether to tick, which copy of the account is newest, what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.formats.account import ACCOUNT_SIZE
from distro_optim.coordinator.rules import machine
from distro_optim.coordinator.solana.client import without_nan
from distro_optim.coordinator.solana.decisions.newest import NewestAccount
from distro_optim.coordinator.solana.decisions.ticking import is_tick_due, should_tick
from distro_optim.coordinator.solana.fees import KEPT_IN_A_WALLET, FeeMeter, FeesSpentError, shown_sol
from distro_optim.coordinator.types import NodeIdentity, RunState, WitnessEvalResult, WitnessMetadata
from distro_optim.errors import ConfigurationError
from distro_optim.testing import DUMMY_CONFIG, dummy_run

FIVE = tuple(NodeIdentity.from_single_key(bytes([number]) * 32) for number in range(5))
WAIT = DUMMY_CONFIG.waiting_for_members_extra_time


# -- ticks -------------------------------------------------------------------------------------------------------------


def test_a_tick_is_due_when_it_would_change_the_phase() -> None:
    run = dummy_run()
    assert not is_tick_due(run, FIVE, WAIT - 1)
    assert is_tick_due(run, FIVE, WAIT)
    assert not is_tick_due(run, FIVE[:2], WAIT)  # three have to be there


def test_nothing_is_due_while_a_run_is_halted() -> None:
    for phase in (RunState.UNINITIALIZED, RunState.PAUSED, RunState.FINISHED):
        assert not is_tick_due(replace(dummy_run(), run_state=phase), FIVE, 10**9)


def test_about_two_of_many_clients_send_a_tick() -> None:
    run = dummy_run()
    drawn = [should_tick(run, FIVE, WAIT + 1, number / 100) for number in range(100)]
    assert sum(drawn) == 40  # two in five


def test_two_clients_leave_nothing_to_chance() -> None:
    run = replace(dummy_run(), config=replace(DUMMY_CONFIG, init_min_clients=2))
    assert should_tick(run, FIVE[:2], WAIT + 1, 0.999)


def test_a_tick_waits_until_the_clusters_clock_is_surely_there() -> None:
    assert not should_tick(dummy_run(), FIVE, WAIT, 0.0)
    assert should_tick(dummy_run(), FIVE, WAIT + 1, 0.0)


def test_a_warm_up_is_over_after_its_time() -> None:
    warm, _ = machine.tick(dummy_run(), FIVE, WAIT, seed=1)
    assert warm.run_state is RunState.WARMUP
    end = WAIT + DUMMY_CONFIG.warmup_time
    assert [is_tick_due(warm, (), now) for now in (end - 1, end)] == [False, True]


# -- copies of the account ---------------------------------------------------------------------------------------------


def copy(nonce: int, version: bytes = b"test") -> bytes:
    data = bytearray(ACCOUNT_SIZE)
    data[119050 : 119050 + len(version)] = version
    data[-8:] = nonce.to_bytes(8, "little")
    return bytes(data)


@given(st.permutations(range(1, 9)), st.integers(1, 8))
def test_late_and_doubled_copies_change_nothing(order: list[int], doubled: int) -> None:
    newest, seen = NewestAccount(), []
    for nonce in [*order, doubled]:
        if newest.offer(copy(nonce), slot=100 + nonce):
            seen.append(nonce)
    assert seen == sorted(set(seen))
    assert newest.data == copy(8)


def test_changes_within_one_slot_are_told_apart() -> None:
    newest = NewestAccount()
    assert [newest.offer(copy(nonce), slot=7) for nonce in (3, 2, 5, 4)] == [True, False, True, False]


def test_a_new_version_of_the_client_has_no_new_nonce() -> None:
    newest = NewestAccount()
    assert newest.offer(copy(3), 10)
    assert newest.offer(copy(3, b"v2"), 11)
    assert not newest.offer(copy(3), 10)


def test_what_the_cluster_takes_back_is_taken_back() -> None:
    newest = NewestAccount()
    newest.offer(copy(9), 10)
    assert not newest.offer(copy(8), 10)
    assert newest.offer(copy(8), 11)


@pytest.mark.parametrize("size", [0, 8, ACCOUNT_SIZE - 1, ACCOUNT_SIZE + 1])
def test_a_copy_of_another_size_is_none(size: int) -> None:
    assert not NewestAccount().offer(bytes(size), 5)


# -- fees and numbers --------------------------------------------------------------------------------------------------


def test_fees_are_counted_up_to_their_limit() -> None:
    fees = FeeMeter(12_000)
    for _ in range(2):
        fees.check()
        fees.paid()
    assert (fees.spent, fees.transactions) == (10_000, 2)
    with pytest.raises(FeesSpentError, match=r"0\.00001 SOL, and more than 0\.000012 SOL may not"):
        fees.check()
    with pytest.raises(ConfigurationError, match="max_fees"):
        FeeMeter(4999)


def test_a_wallet_that_does_not_last_is_told_an_epoch_ahead() -> None:
    fees = FeeMeter()
    assert fees.epoch_begins(10**9) is None
    for _ in range(10):
        fees.paid()
    assert "does not last for the next one" in str(fees.epoch_begins(KEPT_IN_A_WALLET + 99_999))
    for _ in range(10):
        fees.paid()
    assert fees.epoch_begins(KEPT_IN_A_WALLET + 100_000) is None


def test_amounts_are_shown_without_rounding() -> None:
    assert [shown_sol(n) for n in (0, 5000, 10**9, 830_244_480)] == ["0 SOL", "0.000005 SOL", "1 SOL", "0.83024448 SOL"]


def test_numbers_that_are_none_are_replaced_as_psyche_does() -> None:
    nan = float("nan")
    given_ = WitnessMetadata(1, nan, 2.0, nan, (WitnessEvalResult("a", nan),), (), 0, nan)
    assert without_nan(given_) == WitnessMetadata(1, 0.0, 2.0, float("inf"), (WitnessEvalResult("a", 0.0),), (), 0, 0.0)
