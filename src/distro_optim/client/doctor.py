"""``distro-optim doctor``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..comm.iroh.reach_options import add_reach_options, reach_from

if TYPE_CHECKING:
    from .findings import Finding

__all__ = ["add_options", "run"]

_MARKS: Final = {"good": "ok", "note": "--", "bad": "!!"}
"""In front of a line."""

_UNITS: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.description = (
        "Looks whether this machine can train with others, and over which ways. With a ticket: whether the run's host "
        "and peers can be reached, and how fast the line is. With a model: what it takes, and what a round takes. Each "
        "line ends with what to do. The status is 1 if something must be done."
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="a ticket, or host:port/run-id")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--parameters", type=_count, metavar="N", help="of a model: 124M, 1.3B or a number")
    model.add_argument("--model", type=Path, metavar="DIR", help="folder with the weights of one (*.safetensors)")
    parser.add_argument("--peers", type=int, metavar="N", help="how many train (those of the run and us, or 2)")
    parser.add_argument("--device", default="auto", help="where the model would be (%(default)s)")
    parser.add_argument("--checkpoint-dir", type=Path, default=Path(), metavar="DIR", help="where it would be saved")
    parser.add_argument("--bind-p2p-port", type=int, default=0, metavar="N", help="UDP port (any free one)")
    add_reach_options(parser.add_argument)
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    """Looks and prints; 0 if nothing must be done, 1 otherwise.

    Raises:
        ConfigurationError: an option cannot be.
    """
    from .findings import examine
    from .probing import DoctorOptions, look_into

    def found(name: str) -> tuple[str, Any]:
        return f"--{name.replace('_', '-')}", getattr(options, name)

    facts = look_into(
        DoctorOptions(
            run=options.run,
            port=options.bind_p2p_port,
            folder=options.checkpoint_dir,
            device=options.device,
            parameters=options.parameters,
            model=options.model,
            peers=options.peers,
            **reach_from(found),
        )
    )
    findings = examine(facts)
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        print("\n".join(lines_of(findings)))
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


def lines_of(findings: Sequence[Finding]) -> list[str]:
    """As a person reads them."""
    width = max((len(finding.about) for finding in findings), default=0)
    return [
        f"{_MARKS[finding.verdict]} {finding.about:{width}}  {finding.found}"
        + ("" if finding.to_do == "nothing" else f"\n   {'':{width}}  -> {finding.to_do}")
        for finding in findings
    ]


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb]?)", text.strip().lower().replace("_", "").replace(",", ""))
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 0 < count < 1 << 50:
        raise argparse.ArgumentTypeError(f"must be a number of parameters such as 124M or 1300000000, got {text!r}")
    return count
