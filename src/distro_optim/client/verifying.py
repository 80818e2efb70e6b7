"""``distro-optim verify``: its options, and what it prints, of a recording and of a run that goes on."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..comm.iroh.reach_options import add_reach_options, reach_from
from ..coordinator.ticket_text import MAX_TEXT, SOLANA, is_ticket
from ..errors import ConfigurationError, ProtocolError
from .replaying import Progress

if TYPE_CHECKING:
    from ..strategy.port import RunView
    from ..verify.calibrate import Limits
    from ..verify.recompute import Evidence
    from .verify import Checked

__all__ = ["Enough", "Watcher", "add_options", "run"]

SIGMAS: Final = 3.0
"""So many standard errors beyond a limit that was not learnt a result has to be."""

IDENTITY: Final = Path("observer.key")
"""Where the key is kept by which hosts know us. Elsewhere than that of a client, which may not watch."""

_HOST_AND_RUN: Final = re.compile(r"[^/\s]+:\d{1,5}(/.*)?")
_MAX_SHOWN: Final = 80
"""Characters of a run's name that are repeated in an error; a ticket is longer."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Tells of every result of a recorded run whether it agrees with the gradient of the batch that its sender was "
        "given, which copies, other data and momentum without training do not. Gradients are computed here, so the "
        "data of the run are needed. Recordings are what join --write-gradients-dir leaves. A run of our own kind is "
        "watched while it goes on, if its host lets us, until it ends, or Ctrl-C. The status is 1 if a peer fails."
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER|RUN",
        help="state.toml, config.json, initial.safetensors and results; or a ticket, or host:port/run-id",
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
    live = parser.add_argument_group("of a run that goes on")
    live.add_argument(
        "--identity",
        type=Path,
        default=IDENTITY,
        metavar="FILE",
        help="our secret key, whose public one the host lets watch; made if missing (%(default)s)",
    )
    live.add_argument("--rounds", type=int, metavar="N", help="end after so many audited rounds (with the run)")
    live.add_argument("--share", type=float, default=1.0, metavar="SHARE", help="of the results to audit (all)")
    live.add_argument("--model", type=Path, metavar="DIR", help="folder with the run's model, if it is here")
    live.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:N (%(default)s)")
    live.add_argument("--bind-addr", default="0.0.0.0:0", metavar="IP:PORT", help="where to listen (any free port)")
    add_reach_options(live.add_argument)


def run(options: argparse.Namespace) -> int:
    """Verifies; 0 if nothing speaks against anybody, and 1 otherwise.

    Raises:
        ConfigurationError, DataError, ModelWeightsError: the folder cannot be verified; says why.
    """
    text = str(options.folder)
    if _names_a_run(text):
        _refuse_what_cannot_be_watched(text)
        return _watch(text, options)

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


class Enough(BaseException):
    """As many rounds were audited as were asked for. It comes out of the thread that audits, past everything."""


class Watcher:
    """What was found in a run that goes on.

    Args:
        rounds: after which it is enough; None goes on to the end of the run.

    Attributes:
        tell: told each finding, in a sentence and as facts.
        view: of the run.
        peers: all that was found of each, by public key.
    """

    def __init__(self, rounds: int | None = None) -> None:
        self.tell: Callable[..., None] = lambda text, **facts: print(text)
        self.view: Callable[[], RunView] | None = None
        self.peers: dict[bytes, Evidence] = {}
        self._rounds = rounds
        self._steps: set[int] = set()

    def audited(self, step: int, peer: bytes, found: Evidence) -> None:
        """A result of a peer was audited.

        Raises:
            Enough: it is of one round too many.
        """
        if self._rounds is not None and step not in self._steps and len(self._steps) >= self._rounds:
            raise Enough
        self._steps.add(step)
        before = self.peers.get(peer)
        self.peers[peer] = found if before is None else before + found
        numbers = {"step": step, "peer": peer.hex(), **found.record()}
        self.tell(f"step {step}: peer {peer.hex()[:8]}: {_numbers(found)}", audit=numbers)

    @property
    def failed(self) -> frozenset[bytes]:
        """Peers whose audits together say that they do not train what they are given."""
        audits = {} if self.view is None else self.view().audits
        return frozenset(peer for peer, count in audits.items() if count.failed)

    def summary(self) -> tuple[bool, list[str]]:
        """Whether a peer fails, and what to say of each."""
        from ..verify.calibrate import judge, of_peers

        if not self.peers:
            return False, ["no result was audited"]
        limits, failed = of_peers(self.peers.values()), self.failed
        lines, fails = [], False
        for peer, evidence in self.peers.items():
            reasons = judge(evidence, limits, sigmas=SIGMAS)
            named = ["its audits together say that it does not train what it is given"] if peer in failed else []
            against = [*named, *(reasons or [])]
            fails |= bool(against)
            said = "too little to tell" if reasons is None else "nothing speaks against it"
            said = f"FAILS: {'; '.join(against)}" if against else said
            lines.append(f"peer {peer.hex()[:8]}: {_numbers(evidence)}: {said}")
        return fails, [f"{len(self._steps)} rounds were audited", *lines]


def _watch(run: str, options: argparse.Namespace) -> int:
    """Watches a run; 0 if nothing speaks against anybody, and 1 otherwise. Ctrl-C ends it."""
    from .joining import join
    from .options import JoinOptions

    if options.rounds is not None and options.rounds < 1:
        raise ConfigurationError(f"--rounds {options.rounds}: give 1 or more", name="rounds", value=options.rounds)
    for name in ("limits", "learn"):
        if getattr(options, name) is not None:
            raise ConfigurationError(
                f"--{name} is for a recording; a run that goes on is judged by what most of its peers have", name=name
            )

    def found(name: str) -> tuple[str, Any]:
        return f"--{name.replace('_', '-')}", getattr(options, name)

    watcher = Watcher(options.rounds)
    request = JoinOptions(
        run=run,
        identity_secret_key_path=options.identity,
        bind_addr=options.bind_addr,
        device=options.device,
        model=options.model,
        data=options.data,
        micro_batch_size=options.micro_batch_size,
        no_checkpoints=True,
        logs="json" if options.json else "console",
        audit=options.share,
        **reach_from(found),
    )
    try:
        join(request, watcher=watcher)
    except (Enough, KeyboardInterrupt):
        pass
    fails, lines = watcher.summary()
    if options.json:
        print(json.dumps({"summary": lines, "failed": [peer.hex() for peer in sorted(watcher.failed)]}))
    else:
        print("\n".join(lines))
    return 1 if fails else 0


def _names_a_run(text: str) -> bool:
    """Whether ``text`` names a run in the place of a recording."""
    if len(text) > MAX_TEXT or os.path.exists(text):
        return False
    return is_ticket(text) or text.lower().startswith(SOLANA) or _HOST_AND_RUN.fullmatch(text) is not None


def _refuse_what_cannot_be_watched(text: str) -> None:
    """Raises :class:`~distro_optim.errors.ConfigurationError` if a run's name says already that nobody can."""
    if not text.lower().startswith(SOLANA) and (is_ticket(text) or "/" in text):
        return
    run = text if len(text) <= _MAX_SHOWN else "TICKET"
    raise ConfigurationError(
        "verify watches runs of our own kind, by a ticket or host:port/run-id. Peers of other runs give its results to "
        f"its members only. Audit as a member: distro-optim join {run} --audit 1. Or record the run and verify that: "
        f"distro-optim join {run} --write-gradients-dir recorded, then distro-optim verify recorded",
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
