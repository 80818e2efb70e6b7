"""How one peer of a run is doing, as a file of JSON lines: written by the peer, read by those who watch it.

::

    {"kind": "round", "time": 1700000000.5, "name": "peer 1", "peer": "9f2c...", "epoch": 1, "step": 17, ...}

Each line is complete in itself. A peer that is killed in the middle of one leaves half a line, which readers skip; when
it comes back it goes on in the same file. A file that has grown to :data:`MAX_BYTES` becomes ``FILE.1``, in place of
the one before, and the next line begins a new one. That a report cannot be written is logged once and never stops the
training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from ..console import printable
from .environment import RunEnvironment

__all__ = [
    "ENDED",
    "EVENT",
    "JOINED",
    "KINDS",
    "ROUND",
    "ReportLine",
    "ReportReader",
    "RunReporter",
    "ddp_bytes",
    "weights_hash",
]

JOINED: Final = "joined"
"""Kind of line: the peer is in the run."""
ROUND: Final = "round"
"""Kind of line: the peer is done with a round, whether it trained in it or not."""
EVENT: Final = "event"
"""Kind of line: something happened, in words."""
ENDED: Final = "ended"
"""Kind of line: nothing more will come; with the weights that the peer ends with, and why if it is an error."""
KINDS: Final = (JOINED, ROUND, EVENT, ENDED)
"""All kinds of line."""

MAX_TEXT: Final = 500
"""Characters of an event; part of it may come from a stranger."""

MAX_LINE: Final = 16 * 1024
"""Bytes. No line that this module writes is longer; longer ones are skipped."""

MAX_BYTES: Final = 256 * 1024 * 1024
"""Of a report, and of the one before it: about half a million rounds. Chosen arbitrarily."""

READ_AT_ONCE: Final = 1024 * 1024
"""Bytes that a reader takes at a time, so that a huge file does not fill the memory."""

LARGEST_NUMBER: Final = 2**64
"""A larger number counts nothing real, and may break what shows it."""

BF16_BYTES: Final = 2
"""Bytes of a bfloat16."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportLine:
    """One line. Sums count from the start of this process.

    Attributes:
        kind: of :data:`KINDS`.
        time: Unix time in seconds.
        name: of the peer, for people.
        peer: its public key in hexadecimal.
        epoch, step: of the run. The steps that follow the last that is trained, in which the last results are applied,
            have numbers, too.
        total_steps: the last step that is trained; 0 if it is not known.
        run_state: phase of the run.
        num_peers: in the epoch.
        waiting_peers: that wait for the next epoch; known to the host, left out of the reports of others.
        loss: mean over the peer's own batch; None if it did not train, or if it is not finite.
        bytes_sent, bytes_received: by this peer to and from all others, everything counted.
        ddp_bytes: that it would have sent if the gradients of these rounds were summed by a ring all-reduce in bf16.
        seconds_training: the training thread computed.
        seconds_waiting: the training thread waited for the network or for other peers.
        weights_hash: SHA-256 in hexadecimal over all parameters as they were at the start of the step; in a line of
            kind "ended", as they are at the end. Peers that do not look at the same step are not comparable.
        text: what happened, in words.
    """

    kind: str
    time: float = 0.0
    name: str = ""
    peer: str = ""
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    run_state: str = ""
    num_peers: int = 0
    waiting_peers: int | None = None
    loss: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0
    ddp_bytes: int = 0
    seconds_training: float = 0.0
    seconds_waiting: float = 0.0
    weights_hash: str = ""
    text: str = ""

    def to_json(self) -> str:
        """The line, without its end."""
        record = dataclasses.asdict(self)
        if self.loss is not None and not math.isfinite(self.loss):
            record["loss"] = None  # JSON has no word for it
        if self.waiting_peers is None:
            del record["waiting_peers"]
        record["time"] = round(self.time, 3)
        record["text"] = printable(self.text)[:MAX_TEXT]
        return json.dumps(record)

    @classmethod
    def from_json(cls, line: str | bytes) -> ReportLine | None:
        """Reads a line; None if it is not one. Fields that are not known here are left out."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: not JSON, or not UTF-8
            return None
        if not isinstance(record, dict) or record.get("kind") not in KINDS:
            return None
        known = {name: record[name] for name in _FIELDS.keys() & record.keys()}
        if not all(_fits(value, _FIELDS[name]) for name, value in known.items()):
            return None
        return cls(**known)


_TYPES: Final = {
    "str": str,
    "int": int,
    "int | None": (int, type(None)),
    "float": (int, float),
    "float | None": (int, float, type(None)),
}
_FIELDS: Final[dict[str, Any]] = {field.name: _TYPES[str(field.type)] for field in dataclasses.fields(ReportLine)}


def _fits(value: object, types: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, types):
        return False
    return not isinstance(value, (int, float)) or abs(value) <= LARGEST_NUMBER  # false for NaN as well


def weights_hash(digests: Iterable[bytes]) -> str:
    """SHA-256 in hexadecimal over the digests of all tensors, in the model's order (:func:`.weights.tensor_digest`)."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def ddp_bytes(num_parameters: int, num_peers: int) -> int:
    """Bytes that each of ``num_peers`` sends to all-reduce the gradients of one step in bf16.

    In a ring each passes ``2 (n - 1) / n`` of the gradients on (Patarasuk and Yuan, 2009). Many use fp32: the double.
    """
    if num_peers < 2:
        return 0
    return 2 * (num_peers - 1) * num_parameters * BF16_BYTES // num_peers


class RunReporter:
    """Writes the report of one peer. For one thread.

    Args:
        path: the file, added to; with None nothing is written and everything may be called.
        name: of the peer, for people.
        peer: its public key, 32 bytes.
        num_parameters: of the model, for what DDP would send.
    """

    def __init__(self, path: Path | None, *, name: str = "", peer: bytes = b"", num_parameters: int = 0) -> None:
        self._path = path
        self._name = name or peer.hex()[:8]
        self._peer = peer.hex()
        self._num_parameters = num_parameters
        self._ddp_bytes = 0
        self._last = ReportLine(kind=JOINED)
        self._file: int | None = None
        self._size = 0
        if path is not None:
            self._open(path)

    @classmethod
    def from_environment(
        cls, environment: RunEnvironment, *, peer: bytes = b"", num_parameters: int = 0
    ) -> RunReporter:
        """The reporter that the environment asks for; one that writes nothing if it asks for none."""
        return cls(environment.report, name=environment.peer_name or "", peer=peer, num_parameters=num_parameters)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_writing(self) -> bool:
        """False if the lines go nowhere, so that nothing has to be computed for them."""
        return self._file is not None

    def joined(
        self, *, run_state: str, epoch: int, step: int, num_peers: int, total_steps: int = 0, text: str = ""
    ) -> None:
        """The peer is in the run; it may not train yet."""
        self._last = ReportLine(
            kind=JOINED, run_state=run_state, epoch=epoch, step=step, total_steps=total_steps, num_peers=num_peers
        )
        self._write(dataclasses.replace(self._last, text=text))

    def round(
        self,
        *,
        epoch: int,
        step: int,
        run_state: str,
        num_peers: int,
        loss: float | None,
        total_steps: int = 0,
        waiting_peers: int | None = None,
        bytes_sent: int,
        bytes_received: int,
        seconds_training: float,
        seconds_waiting: float,
        weights_hash: str,
    ) -> None:
        """The peer is done with the round of ``step``; see :class:`ReportLine` for the arguments."""
        self._ddp_bytes += ddp_bytes(self._num_parameters, num_peers)
        self._last = ReportLine(
            kind=ROUND,
            epoch=epoch,
            step=step,
            total_steps=total_steps,
            run_state=run_state,
            num_peers=num_peers,
            waiting_peers=waiting_peers,
            loss=loss,
            bytes_sent=bytes_sent,
            bytes_received=bytes_received,
            seconds_training=seconds_training,
            seconds_waiting=seconds_waiting,
            weights_hash=weights_hash,
        )
        self._write(self._last)

    def tell(self, text: str, *, step: int | None = None, run_state: str | None = None) -> None:
        """Something happened, in a sentence; a line of kind "event", with the sums and state of the line before."""
        last = self._last
        self._write(
            dataclasses.replace(
                last,
                kind=EVENT,
                loss=None,
                weights_hash="",
                step=last.step if step is None else step,
                run_state=last.run_state if run_state is None else run_state,
                text=text,
            )
        )

    def ended(
        self,
        *,
        step: int,
        run_state: str,
        bytes_sent: int,
        bytes_received: int,
        seconds_training: float,
        seconds_waiting: float,
        weights_hash: str,
        text: str = "",
    ) -> None:
        """The peer leaves the run; ``text`` says why, if not because the run is finished."""
        self._write(
            dataclasses.replace(
                self._last,
                kind=ENDED,
                loss=None,
                step=step,
                run_state=run_state,
                bytes_sent=bytes_sent,
                bytes_received=bytes_received,
                seconds_training=seconds_training,
                seconds_waiting=seconds_waiting,
                weights_hash=weights_hash,
                text=text,
            )
        )

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._size = end = os.lseek(self._file, 0, os.SEEK_END)
            if end:
                os.lseek(self._file, end - 1, os.SEEK_SET)
                if os.read(self._file, 1) != b"\n":  # the writer before was killed in the middle of a line
                    os.write(self._file, b"\n")
        except OSError as error:
            self._give_up(error)

    def _write(self, line: ReportLine) -> None:
        if self._file is None:
            return
        line = dataclasses.replace(line, time=time.time(), name=self._name, peer=self._peer, ddp_bytes=self._ddp_bytes)
        try:
            self._size += os.write(self._file, line.to_json().encode() + b"\n")
            if self._size >= MAX_BYTES:
                self._begin_anew()
        except OSError as error:
            self._give_up(error)

    def _begin_anew(self) -> None:
        path = self._path
        if path is not None:
            self.close()
            os.replace(path, path.with_name(f"{path.name}.1"))
            self._open(path)

    def _give_up(self, error: OSError) -> None:
        _log.warning("no report is written to %s: %s", self._path, error.strerror or error)
        self.close()


class ReportReader:
    """Follows a report that is being written.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.skipped = 0
        """Lines that are not of a report."""

    def read(self) -> list[ReportLine]:
        """The lines that have come since the last look."""
        found: list[ReportLine] = []
        try:
            with open(self._path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # a new file has begun
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                while data := file.read(READ_AT_ONCE):
                    self._offset += len(data)
                    found.extend(self._take(data))
        except OSError:
            return found  # not there yet, or not for a moment
        return found

    def _take(self, data: bytes) -> Iterable[ReportLine]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE:
            self._rest = self._rest[:MAX_LINE]  # not of a report; its end will be skipped
        for text in lines:
            line = ReportLine.from_json(text) if len(text) < MAX_LINE else None
            if line is not None:
                yield line
            elif text:
                self.skipped += 1
