"""Transactions that the real programs answered: ours answer with the same error and the same accounts."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from distro_optim.coordinator.formats.account import ACCOUNT_SIZE, read_account
from distro_optim.testing import Validator
from distro_optim.testing.solana.validator import Account
from solana.recorded import TRANSACTIONS, lines_of

SMALL = 4096
MODEL_WAS_WRITTEN = "coordinator_full_round"
"""Where the real account holds what lay in memory before, in the room of other variants of the model."""


def check(account: Account | None, recorded: dict[str, Any], *, exact: bool) -> None:
    """An account is as it was recorded. Of a big one its hash is known, or its bytes."""
    if recorded.get("absent"):
        assert account is None
        return
    assert account is not None
    assert (account.lamports, account.owner) == (recorded["lamports"], recorded["owner"])
    assert account.executable is recorded["executable"]
    if account.executable:
        return
    assert len(account.data) == recorded["len"]
    if "data" in recorded:
        data = base64.b64decode(recorded["data"])
        if len(data) == ACCOUNT_SIZE and any(data):
            assert read_account(account.data) == read_account(data)
        else:
            assert account.data == data
    elif exact:
        assert hashlib.sha256(account.data).hexdigest() == recorded["sha256"]


@pytest.mark.parametrize("file", TRANSACTIONS, ids=lambda file: file.name.split(".")[0])
def test_every_transaction_ends_like_the_real_one(file: Path) -> None:
    validator, errors = Validator(), 0
    exact = MODEL_WAS_WRITTEN not in file.name and "update" not in file.name
    for line in lines_of(file):
        outcome = validator.process(line)
        assert outcome.error == line["error"]
        errors += outcome.error is not None
        for recorded in line["after"]:
            check(validator.accounts.get(recorded["key"]), recorded, exact=exact)
    assert errors or "init_free" in file.name


def test_a_simulation_says_the_same_and_changes_nothing() -> None:
    compared = 0
    for file in TRANSACTIONS:
        validator = Validator()
        for line in lines_of(file):
            if validator.clock.slot == line["slot"] and line["payer"] in validator.accounts:
                before = dict(validator.accounts)
                assert validator.simulate(line).error == line["error"]
                assert validator.accounts == before
                compared += 1
            validator.process(line)
    assert compared > 40
