"""The points ledger of a run: a line of JSON for each epoch, chained by hashes and signed by the host.

A line is an object of two members, without spaces and with sorted names, so that there is one way to write it::

    {"entry": {...}, "signature": "<128 hexadecimal digits>"}

============================  ========================================================================================
``version``                   2; lines of version 1 are read, too
``number``                    0, 1, 2, ...
``previous``                  SHA-256 of the line before, without its line end; in the first, 64 zeros, or the last line
                              of the ledger of the host before, where the run has gone on without that one
``run``, ``host``             the run's name; the public key by which all lines are signed
``time``                      Unix time in seconds
``epoch``, ``steps``          of the run; the first and the last step
``amount``                    points that an epoch is worth
``clients``                   by public key: ``batches``, ``samples``, ``tokens``, ``bytes_served`` (not in version 1),
                              ``audits_passed``, ``audits_failed``, ``healthy``, ``equal``, ``work``; see
                              :mod:`.rules.points`
============================  ========================================================================================

The signature is over the words ``distro-optim ledger 1``, a zero byte and the entry as it stands in the line. What a
ledger proves: the host wrote these lines in this order, and nobody else has changed, left out or added one in between.
What it does not: that the host counted rightly, and that lines were not cut off at the end; whoever wants to notice
that keeps the hash of the last line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from ..comm.signing import SIGNATURE_SIZE, SecretKey, is_signed_by
from ..errors import ProtocolError
from .rules.points import EPOCH_POINTS, ClientAccount, EpochAccount

__all__ = ["GENESIS", "MAX_LINE_BYTES", "Entry", "LedgerTotals", "check_ledger", "line_hash", "read_line", "write_line"]

VERSION: Final = 2
VERSIONS: Final = (1, 2)
GENESIS: Final = "0" * 64

MAX_LINE_BYTES: Final = 1 << 20
"""Some 1024 identities, each of less than 300 bytes, and room for as many again."""

_DOMAIN: Final = b"distro-optim ledger 1\0"
_COUNTS: Final = tuple(f.name for f in fields(ClientAccount) if f.name != "healthy")
_MEMBERS: Final = frozenset(
    {"version", "number", "previous", "run", "host", "time", "epoch", "steps", "amount", "clients"}
)
_LARGEST: Final = (1 << 53) - 1
"""That every reader of JSON takes for a whole number."""


@dataclass(frozen=True)
class Entry:
    """One line, without its signature; see the module.

    Attributes:
        host: public key.
    """

    number: int
    previous: str
    run: str
    host: bytes
    time: int
    account: EpochAccount
    amount: int = EPOCH_POINTS
    version: int = VERSION


def write_line(entry: Entry, key: SecretKey) -> bytes:
    """The signed line, without a line end."""
    body = _body(entry)
    return b'{"entry":' + body + b',"signature":"' + key.sign(_DOMAIN + body).hex().encode() + b'"}'


def read_line(line: bytes) -> Entry:
    """A line whose signature is right.

    Raises:
        ProtocolError: it is none, it is written in another way, or its signature is not that of its host.
    """
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line has {len(line)} bytes, {MAX_LINE_BYTES} at most")
    try:
        parsed = json.loads(line)
        entry = _entry(parsed["entry"])
        signature = bytes.fromhex(parsed["signature"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProtocolError("the line is none of a ledger") from error
    body = _body(entry)
    if line != b'{"entry":' + body + b',"signature":"' + signature.hex().encode() + b'"}':
        raise ProtocolError("the line is not written as a ledger is: it was changed by hand, or by another program")
    if len(signature) != SIGNATURE_SIZE or not is_signed_by(entry.host, _DOMAIN + body, signature):
        raise ProtocolError("the signature is not that of the host: the line was changed")
    return entry


def line_hash(line: bytes) -> str:
    """To which the next line refers."""
    return hashlib.sha256(line).hexdigest()


@dataclass(frozen=True)
class LedgerTotals:
    """A ledger that is in order.

    Attributes:
        run: its name; empty without lines.
        host: public key; empty without lines.
        lines: how many there are.
        last: hash of the last one; of none, 64 zeros.
        follows: hash of the line, in the ledger of another host, that the first one follows; None for none.
        hashes: of all of them.
        clients: sums over all epochs, by public key; ``healthy`` is that of the last one.
        epochs: in how many each of them was healthy at the end.
    """

    run: str
    host: bytes
    lines: int
    last: str
    follows: str | None
    hashes: frozenset[str]
    clients: Mapping[bytes, ClientAccount]
    epochs: Mapping[bytes, int]


def check_ledger(lines: Iterable[bytes]) -> LedgerTotals:
    """Checks every line and the chain.

    Args:
        lines: without their line ends.

    Raises:
        ProtocolError: something does not fit; names the line.
    """
    last, count = GENESIS, 0
    first: Entry | None = None
    hashes: set[str] = set()
    totals: dict[bytes, ClientAccount] = {}
    epochs: dict[bytes, int] = {}
    for number, line in enumerate(lines):
        where = f"line {number + 1}"
        try:
            entry = read_line(line)
        except ProtocolError as error:
            raise ProtocolError(f"{where}: {error}") from error
        if first is None:
            first, last = entry, entry.previous
        if entry.number != number or entry.previous != last:
            raise ProtocolError(f"{where} does not follow the one before: a line was left out, added or moved")
        if (entry.run, entry.host) != (first.run, first.host):
            raise ProtocolError(f"{where} is of another run or another host")
        _check_points(entry, where)
        for key, one in entry.account.clients.items():
            before = totals.get(key, ClientAccount())
            sums = {name: getattr(before, name) + getattr(one, name) for name in _COUNTS}
            totals[key] = ClientAccount(**sums, healthy=one.healthy)
            epochs[key] = epochs.get(key, 0) + one.healthy
        last, count = line_hash(line), number + 1
        hashes.add(last)
    run, host = (first.run, first.host) if first else ("", b"")
    follows = first.previous if first and first.previous != GENESIS else None
    return LedgerTotals(run, host, count, last, follows, frozenset(hashes), totals, epochs)


# -- inside ------------------------------------------------------------------------------------------------------------


def _body(entry: Entry) -> bytes:
    account = entry.account
    left_out = {"bytes_served"} if entry.version == 1 else set()
    clients = {
        key.hex(): {name: value for name, value in asdict(one).items() if name not in left_out}
        for key, one in account.clients.items()
    }
    values = {
        "version": entry.version,
        "number": entry.number,
        "previous": entry.previous,
        "run": entry.run,
        "host": entry.host.hex(),
        "time": entry.time,
        "epoch": account.epoch,
        "steps": [account.first_step, account.last_step],
        "amount": entry.amount,
        "clients": clients,
    }
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


def _entry(values: Any) -> Entry:
    """Raises TypeError, KeyError or ValueError for anything that is none."""
    if not isinstance(values, dict) or values.keys() != _MEMBERS or values["version"] not in VERSIONS:
        raise ValueError("other members")
    texts = (values["previous"], values["run"], values["host"])
    if not all(isinstance(text, str) for text in texts) or len(values["previous"]) != len(GENESIS):
        raise ValueError("texts")
    if bytes.fromhex(values["previous"]).hex() != values["previous"]:
        raise ValueError("no hash")
    first, last = values["steps"]
    for number in (values["version"], values["number"], values["time"], values["epoch"], values["amount"], first, last):
        _whole(number)
    return Entry(
        values["number"],
        values["previous"],
        values["run"],
        bytes.fromhex(values["host"]),
        values["time"],
        EpochAccount(
            values["epoch"], first, last, {bytes.fromhex(k): _client(v) for k, v in values["clients"].items()}
        ),
        values["amount"],
        values["version"],
    )


def _client(values: Any) -> ClientAccount:
    one = ClientAccount(**values)
    for name in _COUNTS:
        _whole(getattr(one, name))
    if type(one.healthy) is not bool:
        raise ValueError("healthy")
    return one


def _whole(value: object) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError("no whole number")


def _check_points(entry: Entry, where: str) -> None:
    """Points that do not follow from what is written beside them."""
    clients = entry.account.clients.values()
    worked = sum(one.samples for one in clients if not one.audits_failed)
    for one in clients:
        work = entry.amount * one.samples // worked if worked and not one.audits_failed else 0
        if one.work != work or (one.equal and (not one.healthy or one.audits_failed)):
            raise ProtocolError(f"{where}: points do not follow from the work and the audits")
    if sum(one.equal for one in clients) > entry.amount:
        raise ProtocolError(f"{where}: more points were given than the epoch is worth")
