"""``distro-optim verify``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..coordinator.ticket_text import MAX_TEXT, SOLANA, is_ticket
from ..errors import ConfigurationError, ProtocolError
from .replaying import Progress

if TYPE_CHECKING:
    from ..verify.calibrate import Limits
    from ..verify.recompute import Evidence
    from .verify import Checked

__all__ = ["add_options", "run"]

SIGMAS: Final = 3.0
"""So many standard errors beyond a limit that was not learnt a result has to be."""

_HOST_AND_RUN: Final = re.compile(r"[^/\s]+:\d{1,5}(/.*)?")
_MAX_SHOWN: Final = 80
"""Characters of a run's name that are repeated in an error; a ticket is longer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Tells of every result of a recorded run whether it agrees with the gradient of the batch that its sender was "
        "given, which copies, other data and momentum without training do not. Gradients are computed here, so the "
        "data of the run are needed. Recordings are what join --write-gradients-dir leaves. The status is 1 if a peer "
        "fails. A run that goes on is audited by its members: join --audit."
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="state.toml, config.json, initial.safetensors and results"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--data", type=Path, metavar="PATH", help="file or folder with the training data, or a data.toml"
    )
    parser.add_argument(
        "--limits",
        type=Path,
        metavar="FILE",
        help="limits that were learnt; otherwise those that most peers of the recording keep",
    )
    parser.add_argument(
        "--learn", type=Path, metavar="FILE", help="take all peers for honest, and write the limits that they keep"
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=8, metavar="N", help="sequences to compute at a time (%(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Verifies; 0 if nothing speaks against anybody, and 1 otherwise.

    Raises:
        ConfigurationError, DataError, ModelWeightsError: the folder cannot be verified; says why.
    """
    _refuse_live_run(str(options.folder))

    from ..verify.calibrate import Noise, judge, learn, of_peers
    from ..verify.recompute import Evidence
    from .replay import Recording
    from .verify import open_data, verify

    if options.micro_batch_size < 1:
        raise ConfigurationError(
            f"--micro-batch-size {options.micro_batch_size}: give 1 or more", name="micro_batch_size"
        )
    limits = None if options.limits is None else _read(options.limits)
    recording = Recording.open(options.folder)
    checked = list(
        verify(
            recording,
            lambda vocabulary: open_data(recording, options.data, vocabulary),
            micro_batch_size=options.micro_batch_size,
            progress=Progress(),
        )
    )
    if not checked:
        raise ConfigurationError(
            f"no result of {options.folder} is of a step that its initial.safetensors lead to: all are older",
            name="folder",
            value=options.folder,
        )
    # Where nobody says who sent a result, each stands for itself.
    peers: dict[str, Evidence] = {}
    for one in checked:
        name = _name(one)
        peers[name] = peers.get(name, Evidence()) + one.evidence
    learnt = limits is not None
    limits = limits if limits is not None else of_peers(peers.values())
    sigmas = 0.0 if learnt else SIGMAS
    verdicts = {name: judge(evidence, limits, sigmas=sigmas) for name, evidence in peers.items()}
    if options.learn is not None:
        noise: dict[bytes, list[Noise]] = {}
        for one in checked:
            noise.setdefault(_name(one).encode() if one.peer else b"", []).append(Noise.of(one.evidence))
        limits = learn(noise)
        _write(options.learn, limits)
    if options.json:
        print(json.dumps(_record(checked, peers, verdicts, limits)))
    else:
        _print(checked, peers, verdicts)
        print(limits.table())
    return 1 if any(verdicts.values()) else 0


def _refuse_live_run(text: str) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` if ``text`` names a run in the place of a recording."""
    if len(text) > MAX_TEXT or os.path.exists(text):
        return
    if not (is_ticket(text) or text.lower().startswith(SOLANA) or _HOST_AND_RUN.fullmatch(text)):
        return
    run = text if len(text) <= _MAX_SHOWN else "TICKET"
    raise ConfigurationError(
        "verify reads a recording, and this names a run. Peers of a run give its results to its members only, so that "
        f"nobody can watch them from outside. Audit as a member: distro-optim join {run} --audit 1. Or record the run "
        f"and verify that: distro-optim join {run} --write-gradients-dir recorded, then distro-optim verify recorded",
        name="folder",
        value=text[:_MAX_SHOWN],
    )


def _name(one: Checked) -> str:
    return f"peer {one.peer}" if one.peer else f"step {one.step}, {one.batch}"


def _read(path: Path) -> Limits:
    from ..verify.calibrate import MAX_BYTES, Limits

    try:
        with path.open("rb") as file:
            return Limits.decode(file.read(MAX_BYTES + 1))
    except OSError as error:
        raise ConfigurationError(f"--limits {path}: {error.strerror or error}", name="limits", value=path) from None
    except ProtocolError as error:
        raise ConfigurationError(f"--limits {path}: {error}", name="limits", value=path) from error


def _write(path: Path, limits: Limits) -> None:
    try:
        path.write_bytes(limits.encode())
    except OSError as error:
        raise ConfigurationError(f"--learn {path}: {error.strerror or error}", name="learn", value=path) from None


def _record(
    checked: Sequence[Checked],
    peers: dict[str, Evidence],
    verdicts: dict[str, list[str] | None],
    limits: Limits,
) -> dict[str, Any]:
    return {
        "rounds": [one.record() for one in checked],
        "peers": [
            {"peer": name, "honest": None if verdicts[name] is None else not verdicts[name], "reasons": verdicts[name]}
            | evidence.record()
            for name, evidence in peers.items()
        ],
        "limits": json.loads(limits.encode()),
    }


def _print(checked: Sequence[Checked], peers: dict[str, Evidence], verdicts: dict[str, list[str] | None]) -> None:
    for one in checked:
        who = f"{one.batch} of {one.peer}" if one.peer else str(one.batch)
        rather = f"; agrees rather with {one.rather}" if one.rather is not None else ""
        print(f"step {one.step}: {who}: {_numbers(one.evidence)}{rather}")
    for name, evidence in peers.items():
        reasons = verdicts[name]
        said = "too little to tell" if reasons is None else "; ".join(reasons) or "nothing speaks against it"
        print(f"{name}: {_numbers(evidence)}: {'FAILS: ' if reasons else ''}{said}")


def _numbers(evidence: Evidence) -> str:
    return (
        f"{evidence.assigned.total} signs, {evidence.assigned.share:.3f} agree with its batch, "
        f"{evidence.control.share:.3f} with another (+- {evidence.assigned.error:.3f})"
    )
