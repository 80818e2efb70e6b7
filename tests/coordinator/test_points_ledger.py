"""What clients did in an epoch, as a quorum saw it, written down so that nobody can change it afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.cli import main
from distro_optim.comm.signing import SecretKey
from distro_optim.coordinator.ledger import (
    MAX_LINE_BYTES,
    Entry,
    check_ledger,
    line_hash,
    read_line,
    write_line,
)
from distro_optim.coordinator.messages import Join, WarmupStep, WitnessMessage, WitnessStep
from distro_optim.coordinator.rules.points import EPOCH_POINTS, Account, ClientAccount, EpochAccount
from distro_optim.coordinator.server.host import EpochEnded, RunHost
from distro_optim.coordinator.server.ledger_file import LedgerFile, read_ledger
from distro_optim.coordinator.types import NodeIdentity, RunState
from distro_optim.errors import ConfigurationError, ProtocolError
from distro_optim.serve.status import describe, event_record
from distro_optim.testing.coordinator import metadata
from runs import clients, elected, ready, report, waiting_run

SEED = 7
KEY, OTHER_KEY = SecretKey(bytes(31) + b"\1"), SecretKey(bytes(31) + b"\2")
CLIENTS = clients(1, 2, 3)


def epoch(
    seen: Callable[[int], Sequence[NodeIdentity]],
    *,
    rounds: int = 8,
    leaves: NodeIdentity | None = None,
    account: Account | None = None,
) -> EpochAccount:
    """An epoch of three clients; in each round the witnesses say that they saw the results of ``seen(round)``."""
    host = RunHost(
        waiting_run(
            "run",
            round_witness_time=0,
            witness_nodes=0,
            init_min_clients=3,
            min_clients=1,
            global_batch_size_start=6,
            global_batch_size_end=6,
        ),
        account=account or Account(),
    )
    for identity in CLIENTS:
        host.receive(identity, Join("run"), 0, SEED)
    host.tick(10, SEED)
    for index, client in enumerate(host.state.epoch_state.clients):
        host.receive(client.id, WitnessMessage(WarmupStep(ready(index))), 10, SEED)
    now = 10
    for number in range(100):
        if number == rounds - 2 and leaves is not None:
            host.disconnect(leaves)
        if number == rounds:
            now += host.state.config.epoch_time
        for identity, proof in elected(host.state) if host.state.run_state is RunState.ROUND_TRAIN else ():
            witness = report(proof, seen(number))
            host.receive(identity, WitnessMessage(WitnessStep(witness, metadata(1))), now, SEED)
        now += 1
        for event in host.tick(now, SEED):
            if isinstance(event, EpochEnded):
                assert event.account is not None
                return event.account
    raise AssertionError("the epoch did not end")


def test_batches_count_that_a_quorum_saw_two_rounds_later() -> None:
    account = epoch(lambda _: CLIENTS)
    # Of eleven rounds the last two train nothing.
    assert (account.first_step, account.last_step) == (1, 11)
    assert {key: one.batches for key, one in account.clients.items()} == {c.signer: 9 for c in CLIENTS}
    for one in account.clients.values():
        assert (one.samples, one.tokens, one.healthy) == (18, 18 * 16, True)
        assert (one.equal, one.work) == (EPOCH_POINTS // 3, EPOCH_POINTS // 3)


def test_who_is_not_seen_has_no_work_and_who_is_seen_by_few_neither() -> None:
    account = epoch(lambda number: CLIENTS[:2] if number else CLIENTS)
    first, second, third = (account.clients[c.signer] for c in CLIENTS)
    assert (first.batches, second.batches, third.batches) == (9, 9, 0)
    assert (first.work, third.work) == (EPOCH_POINTS // 2, 0)
    # Psyche's rule asks only whether a client was healthy to the end.
    assert third.equal == EPOCH_POINTS // 3


def test_who_leaves_keeps_its_work_and_has_no_share() -> None:
    account = epoch(lambda _: CLIENTS, leaves=CLIENTS[2])
    gone = account.clients[CLIENTS[2].signer]
    assert (gone.healthy, gone.equal) == (False, 0)
    assert gone.work > 0
    assert account.clients[CLIENTS[0].signer].equal == EPOCH_POINTS // 2


def test_a_failed_audit_takes_all_points_of_the_epoch() -> None:
    account = Account()
    told: list[int] = []

    def seen(number: int) -> Sequence[NodeIdentity]:
        if number == 3 and not told:
            told.append(number)
            account.audited(CLIENTS[1].signer, passed=False)
            account.audited(CLIENTS[0].signer, passed=True)
        return CLIENTS

    found = epoch(seen, account=account)
    cheat, honest = found.clients[CLIENTS[1].signer], found.clients[CLIENTS[0].signer]
    assert (cheat.equal, cheat.work, cheat.audits_failed, cheat.batches) == (0, 0, 1, 9)
    assert (honest.audits_passed, honest.work) == (1, EPOCH_POINTS // 2)


def test_a_run_that_was_never_seen_has_no_account() -> None:
    assert Account().end(waiting_run("run")) is None


def test_a_server_tells_and_shows_who_did_what() -> None:
    ended = EpochEnded(account=epoch(lambda number: CLIENTS[:2]))
    assert f"{CLIENTS[0].signer.hex()[:8]} 18 samples, {EPOCH_POINTS // 2} points" in describe(ended)
    record = json.loads(json.dumps(event_record(ended)))
    assert record["account"][CLIENTS[2].signer.hex()]["work"] == 0
    assert describe(EpochEnded()) == "the epoch is complete"


# -- the chain ---------------------------------------------------------------------------------------------------------


def account_of(epoch_number: int) -> EpochAccount:
    works = [100, 300]
    return EpochAccount(
        epoch_number,
        1,
        9,
        {
            client.signer: ClientAccount(
                batches=3,
                samples=samples,
                tokens=16 * samples,
                healthy=True,
                equal=EPOCH_POINTS // 2,
                work=EPOCH_POINTS * samples // sum(works),
            )
            for client, samples in zip(CLIENTS, works, strict=False)
        },
    )


def make_ledger(folder: Path, epochs: int = 4) -> Path:
    ledger = LedgerFile(folder, "run/1", KEY)
    for number in range(epochs):
        ledger.append(account_of(number), 1_700_000_000 + number)
    return ledger.path


def test_a_ledger_is_in_order_and_goes_on_where_it_was(tmp_path: Path) -> None:
    path = make_ledger(tmp_path, 2)
    make_ledger(tmp_path, 2)  # by another process
    totals = read_ledger(path)
    assert (totals.run, totals.host, totals.lines) == ("run/1", KEY.public, 4)
    assert totals.clients[CLIENTS[1].signer].work == 4 * EPOCH_POINTS * 3 // 4
    assert totals.epochs[CLIENTS[0].signer] == 4
    assert totals.last == line_hash(path.read_bytes().splitlines()[-1])


def change(line: bytes, **values: Any) -> bytes:
    """The line with other values, signed by nobody anew."""
    parsed = json.loads(line)
    parsed["entry"].update(values)
    return json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()


def signed_anew(line: bytes, key: SecretKey = OTHER_KEY, **values: Any) -> bytes:
    return write_line(replace(read_line(line), **values), key)


def tampered(lines: list[bytes]) -> dict[str, list[bytes]]:
    one, two, three, four = lines
    more = {CLIENTS[0].signer.hex(): {**json.loads(two)["entry"]["clients"][CLIENTS[0].signer.hex()], "batches": 99}}
    points = replace(
        account_of(1), clients={CLIENTS[0].signer: ClientAccount(samples=1, healthy=True, work=EPOCH_POINTS - 1)}
    )
    generous = replace(
        account_of(1), clients={c.signer: ClientAccount(healthy=True, equal=EPOCH_POINTS) for c in CLIENTS}
    )
    unhealthy = replace(account_of(1), clients={CLIENTS[0].signer: ClientAccount(equal=1)})
    return {
        "more work": [one, change(two, clients=more), three, four],
        "another time": [one, change(two, time=5), three, four],
        "left out": [one, three, four],
        "moved": [one, three, two, four],
        "doubled": [one, two, two, three, four],
        "begun later": [two, three, four],
        "signed by another": [one, signed_anew(two), three, four],
        "all by another from here": [one, signed_anew(two, host=OTHER_KEY.public), three, four],
        "another run": [one, signed_anew(two, KEY, run="other"), three, four],
        "another signature": [one, two[:-3] + b'0"}', three, four],
        "spaces": [one, two.replace(b'","', b'", "', 1), three, four],
        "no line": [one, b"", two, three, four],
        "half a line": [one, two[: len(two) // 2], three, four],
        "points by favour": [one, signed_anew(two, KEY, account=points)],
        "more points than there are": [one, signed_anew(two, KEY, account=generous)],
        "points for nobody": [one, signed_anew(two, KEY, account=unhealthy)],
        "no whole number": [one, change(two, time=5.5), three, four],
        "larger than any": [one, b" " * (MAX_LINE_BYTES + 1)],
        "deep": [one, b"[" * 100_000],
    }


def test_whatever_is_changed_is_found(tmp_path: Path) -> None:
    lines = make_ledger(tmp_path).read_bytes().splitlines()
    assert check_ledger(lines).lines == 4
    found = tampered(lines)
    assert len(found) == 19
    for name, changed in found.items():
        with pytest.raises(ProtocolError, match=r"line [1-3]"):
            raise AssertionError(f"{name}: {check_ledger(changed)}")


def test_one_changed_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    lines = make_ledger(tmp_path, 2).read_bytes().splitlines()
    for at in range(0, len(lines[0]), 7):
        changed = bytearray(lines[0])
        changed[at] ^= 1
        with pytest.raises(ProtocolError):
            check_ledger([bytes(changed), lines[1]])


def test_a_damaged_ledger_is_not_continued(tmp_path: Path) -> None:
    path = make_ledger(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigurationError, match="move it away"):
        LedgerFile(tmp_path, "run/1", KEY)


def test_another_key_begins_another_ledger(tmp_path: Path) -> None:
    make_ledger(tmp_path)
    other = LedgerFile(tmp_path, "run/1", OTHER_KEY)
    other.append(account_of(0), 5)
    assert read_ledger(other.path).lines == 1
    make_ledger(tmp_path, 1).rename(other.path)
    with pytest.raises(ConfigurationError, match="is signed by"):
        LedgerFile(tmp_path, "run/1", OTHER_KEY)


def test_the_ledger_of_a_later_host_names_the_last_line_of_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = read_ledger(make_ledger(tmp_path))
    later = LedgerFile(tmp_path, "run/1", OTHER_KEY, follows=first.last)
    assert later.last == first.last
    later.append(account_of(4), 5)
    again = LedgerFile(tmp_path, "run/1", OTHER_KEY, follows="ab" * 32)
    again.append(account_of(5), 6)
    totals = read_ledger(later.path)
    assert (totals.lines, totals.follows, totals.last) == (2, first.last, again.last)
    assert first.follows is None
    assert main(["ledger", "check", str(later.path)]) == 0
    assert f"it follows the line {first.last} of the host before" in capsys.readouterr().out


@given(st.binary(max_size=300))
def test_any_bytes_are_a_line_or_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        read_line(data)


# -- the command -------------------------------------------------------------------------------------------------------


def test_anybody_checks_a_ledger_with_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_ledger(tmp_path)
    assert main(["ledger", "check", str(path)]) == 0
    table = capsys.readouterr().out
    assert "run run/1, 4 epochs" in table
    assert f"{CLIENTS[1].signer.hex()[:16]}" in table
    assert "3000000" in table
    assert main(["ledger", "check", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["clients"][CLIENTS[0].signer.hex()]["epochs"] == 4
    kept = line_hash(path.read_bytes().splitlines()[1])
    assert main(["ledger", "check", str(path), "--host", KEY.public.hex(), "--last", kept]) == 0


def test_the_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_ledger(tmp_path)
    last = read_ledger(path).last
    assert main(["ledger", "check", str(path), "--host", OTHER_KEY.public.hex()]) == 2
    assert "is signed by" in capsys.readouterr().err
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert main(["ledger", "check", str(path)]) == 0
    assert main(["ledger", "check", str(path), "--last", last]) == 2
    assert "was cut off" in capsys.readouterr().err
    assert main(["ledger", "check", str(tmp_path / "nothing")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_an_empty_ledger_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").touch()
    assert main(["ledger", "check", str(tmp_path / "empty")]) == 0
    assert "empty" in capsys.readouterr().out


def test_an_entry_is_read_as_it_was_written() -> None:
    entry = Entry(0, "0" * 64, "run", KEY.public, 5, account_of(3))
    assert read_line(write_line(entry, KEY)) == entry


# -- while it goes on --------------------------------------------------------------------------------------------------


def test_what_is_shown_meanwhile_is_the_sum_of_all_epochs_and_of_the_one_that_goes_on() -> None:
    account = Account()
    shown: list[dict[bytes, ClientAccount]] = []
    host_state: list[Any] = []
    see = account.see

    def seen(number: int) -> Sequence[NodeIdentity]:
        if number == 6:
            shown.append(account.so_far(host_state[-1]))
        return CLIENTS

    def see_and_keep(state: Any) -> None:
        host_state.append(state)
        see(state)

    account.see = see_and_keep  # type: ignore[method-assign]
    paid = epoch(seen, account=account)
    for client in CLIENTS:
        meanwhile, after = shown[-1][client.signer], account.so_far(host_state[-1])[client.signer]
        assert 0 < meanwhile.samples < after.samples
        assert meanwhile.work == after.work == EPOCH_POINTS // 3
        assert after == paid.clients[client.signer] or after.healthy is False
    again = account.so_far(replace(host_state[-1], progress=replace(host_state[-1].progress, epoch=9)))
    assert {key: one.work for key, one in again.items()} == {c.signer: EPOCH_POINTS // 3 for c in CLIENTS}


# -- bytes that others served ------------------------------------------------------------------------------------------


def test_bytes_that_came_from_each_client_are_those_of_the_epoch() -> None:
    counted = {CLIENTS[0].signer: 1000, CLIENTS[1].signer: 0}

    def seen(number: int) -> Sequence[NodeIdentity]:
        counted[CLIENTS[0].signer] += 10
        counted[CLIENTS[1].signer] += 1
        counted[b"somebody else"] = 5
        return CLIENTS

    paid = epoch(seen, account=Account(lambda: dict(counted)))
    first, second, third = (paid.clients[c.signer].bytes_served for c in CLIENTS)
    assert second > 1
    assert first == 10 * second
    assert third == 0
    assert b"somebody else" not in paid.clients


def test_a_line_of_version_1_has_no_bytes_and_is_read(tmp_path: Path) -> None:
    account = epoch(lambda _: CLIENTS)
    old = write_line(Entry(0, "0" * 64, "run", KEY.public, 5, account, version=1), KEY)
    assert b"bytes_served" not in old
    assert read_line(old).account == account
    new = write_line(Entry(1, line_hash(old), "run", KEY.public, 6, account), KEY)
    assert b"bytes_served" in new
    assert check_ledger([old, new]).lines == 2
    with pytest.raises(ProtocolError):
        read_line(old.replace(b'"version":1', b'"version":2'))
    with pytest.raises(ProtocolError):
        read_line(new.replace(b'"version":2', b'"version":3'))


def test_points_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    ledger = LedgerFile(tmp_path, "run", KEY)
    ledger.append(epoch(lambda _: CLIENTS), 5)
    picture = tmp_path / "points.svg"
    assert main(["ledger", "check", str(ledger.path), "--plot", str(picture)]) == 0
    assert "in order" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"<?xml")
    assert main(["ledger", "check", str(ledger.path), "--plot", str(tmp_path / "points.doc")]) == 2
    assert "cannot draw" in capsys.readouterr().err
