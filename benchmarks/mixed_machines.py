"""Three peers whose processors differ train one model: do their weights stay equal?

    python benchmarks/mixed_machines.py                 # 400 rounds, exact and in floats
    python benchmarks/mixed_machines.py --quick         # 40 rounds

The processors are emulated: each peer is a process whose libraries use the kernels of another one (OpenBLAS, which
numpy brings: ``OPENBLAS_CORETYPE``; MKL: ``MKL_CBWR``; PyTorch: ``ATEN_CPU_CAPABILITY``). All of it on this machine,
over real connections. After every update each peer hashes its weights. The table shows the rounds after which all
peers had the same, the rounds that each peer trained (one that finds that its weights are wrong loads them again and
sits out), what they were told, and whether they ended with equal weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

# For what is not installed: the model and the data of the examples.
sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence

import torch
from examples.byte_data import SourceBytes
from examples.byte_model import ByteTransformer, next_byte_loss
from rich.console import Console
from rich.table import Table

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.session import SwarmSession

MACHINES = (
    {"OPENBLAS_CORETYPE": "Haswell", "MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    {"OPENBLAS_CORETYPE": "Prescott", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
    {"OPENBLAS_CORETYPE": "Nehalem", "MKL_CBWR": "AVX", "ATEN_CPU_CAPABILITY": "default"},
)
GLOBAL_BATCH = 6  # windows of a round, two for each peer
DESYNCED = "our weights are not those of the others"


# -- a peer ------------------------------------------------------------------------------------------------------------


class Watched(DisTrO):
    """Hashes the true weights after each update."""

    hashes: list[str]

    def apply(self, updates: Sequence[CompressedUpdate], lr: float | Sequence[float] | None = None) -> None:
        super().apply(updates, lr)
        weights = b"".join(p.detach().numpy().tobytes() for group in self.param_groups for p in group["params"])
        self.hashes.append(hashlib.sha256(weights).hexdigest()[:16])


def be_a_peer(args: argparse.Namespace) -> None:
    """Trains a whole run, and prints JSON: the ticket first, if it hosts, and in the end what became of it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = SourceBytes(context=args.context)
    model = ByteTransformer(width=args.width, layers=args.layers, context=args.context)
    optimizer = Watched(
        model.parameters(), lr=1e-3, compression_decay=0.99, compression_topk=args.k, arithmetic=args.arithmetic
    )
    optimizer.hashes = []
    news: list[str] = []
    settings = RunConfig(
        total_steps=args.rounds,
        global_batch_size=GLOBAL_BATCH,
        min_peers=len(MACHINES) - 1,
        peers_to_start=len(MACHINES),
        epoch_time=3600,
    )
    session = SwarmSession(
        model,
        optimizer,
        run=args.join,
        config=None if args.join else settings,
        dataset_size=len(data),
        relay="none",
        bind_addr="127.0.0.1:0",
        on_event=news.append,
    )
    trained, after = 0, {}
    with session:
        if not args.join:
            print(json.dumps({"ticket": session.ticket}), flush=True)
        for round_ in session.rounds():
            next_byte_loss(model, *data.windows(round_.indices)).backward()
            trained += round_.finish()
            if optimizer.hashes:
                after[round_.step] = optimizer.hashes[-1]
    with torch.no_grad():
        loss = next_byte_loss(model, *data.held_out(64)).item()
    final = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    result = {"trained": trained, "hashes": after, "news": news, "loss": loss, "final": final}
    print(json.dumps(result), flush=True)


# -- the comparison ----------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, arithmetic: str) -> dict[str, object]:
    """One run of all peers, and what became of it."""
    processes: list[subprocess.Popen[str]] = []
    source = str(Path(__file__).parents[1] / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    start = time.monotonic()

    def begin(machine: dict[str, str], *more: str) -> subprocess.Popen[str]:
        sizes = ("rounds", "width", "layers", "context", "k")
        options = [f"--{name}={getattr(args, name)}" for name in sizes]
        command = [sys.executable, __file__, "--peer", f"--arithmetic={arithmetic}", *options, *more]
        errors = open(Path(folder) / f"peer{len(processes)}.log", "w")  # noqa: SIM115 (the process writes to it)
        environment = {**os.environ, **machine, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        processes.append(process)
        return process

    with tempfile.TemporaryDirectory() as folder:
        try:
            host = begin(MACHINES[0])
            assert host.stdout is not None
            first = host.stdout.readline()
            if not first:
                raise SystemExit((Path(folder) / "peer0.log").read_text())
            for machine in MACHINES[1:]:
                begin(machine, f"--join={json.loads(first)['ticket']}")
            outputs = [process.communicate(timeout=args.timeout)[0] for process in processes]
            if any(process.returncode for process in processes):
                raise SystemExit("\n".join(log.read_text() for log in sorted(Path(folder).glob("*.log"))))
        finally:
            for process in processes:
                process.kill()
                process.wait()
    peers = [json.loads(output.splitlines()[-1]) for output in outputs]
    steps = sorted(set().union(*(peer["hashes"] for peer in peers)), key=int)
    seen = [{peer["hashes"].get(step) for peer in peers} for step in steps]
    return {
        "arithmetic": arithmetic,
        "seconds": time.monotonic() - start,
        "rounds": len(steps),
        "equal": sum(len(hashes) == 1 and None not in hashes for hashes in seen),
        "trained": [peer["trained"] for peer in peers],
        "desynced": [sum(DESYNCED in line for line in peer["news"]) for peer in peers],
        "equal_in_the_end": len({peer["final"] for peer in peers}) == 1,
        "loss": [peer["loss"] for peer in peers],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="40 rounds")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--arithmetic", choices=("exact", "float"), help="one of them only")
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--context", type=int, default=128, help="bytes of a window")
    parser.add_argument("--k", type=int, default=32, help="coefficients per tile")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a run may take")
    parser.add_argument("--out", type=Path, default=Path("out/mixed_machines.json"), help="where the figures go too")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--join", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        be_a_peer(args)
        return
    if args.quick:
        args.rounds = 40
    console = Console()
    table = Table(title=f"Three machines, {args.rounds} rounds")
    for column in ("arithmetic", "rounds with equal weights", "rounds trained", "desynced", "equal in the end", "loss"):
        table.add_column(column)
    results = []
    for arithmetic in [args.arithmetic] if args.arithmetic else ["exact", "float"]:
        result = run(args, arithmetic)
        results.append(result)
        table.add_row(
            arithmetic,
            f"{result['equal']} of {result['rounds']}",
            *(", ".join(map(str, result[name])) for name in ("trained", "desynced")),  # type: ignore[call-overload]
            "yes" if result["equal_in_the_end"] else "no",
            ", ".join(f"{loss:.3f}" for loss in result["loss"]),  # type: ignore[attr-defined]
        )
    console.print(table)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1))
    console.print(f"figures written to {args.out}")


if __name__ == "__main__":
    main()
