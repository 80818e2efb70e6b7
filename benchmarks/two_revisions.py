"""One optimizer step now beside that of an earlier revision of this repository, in turns.

    python benchmarks/two_revisions.py 110d1cd
    python benchmarks/two_revisions.py 110d1cd --models 124M --rounds 3

Each is a process of its own with the same model, made-up contributors and threads; they take steps one after the other,
so that a machine that slows down slows all of them, and ratios are taken turn by turn. The earlier one does its work by
torch and in floating point, as it comes; today's are by torch in floating point, by torch with exact arithmetic, and
with the compiled kernels. The earlier revision needs ``benchmarks/optimizer_step.py``, which there is since 6630e32,
and the packages of the environment that this runs in.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
KINDS = ("before", "float", "exact", "kernels")


def work(tree: Path, model: str, kind: str, threads: int) -> None:
    """Takes a step for each line of standard input, or what a line names: ``case k contributors setting``."""
    os.environ["DISTRO_OPTIM_FAST"] = "" if kind == "kernels" else "0"
    sys.path[:0] = [str(tree / "src"), str(tree / "benchmarks")]
    import torch

    torch.set_num_threads(threads)
    import optimizer_step
    from shapes import MODELS, make_params

    import distro_optim

    if not Path(distro_optim.__file__).is_relative_to(tree):
        raise SystemExit(f"distro_optim came from {distro_optim.__file__}, not from {tree}")
    params = make_params(MODELS[model]())
    optimizer: Any = None
    for line in sys.stdin:
        words = line.split()
        if words[0] == "case":
            options: dict[str, Any] = {"psyche": words[3] == "psyche"}
            if kind != "before":
                options |= {"fast": kind == "kernels", "arithmetic": "float" if kind == "float" else "exact"}
            optimizer = None  # its memory first
            optimizer = optimizer_step.Ours(params, int(words[1]), int(words[2]), **options)
            optimizer.step()
        began = time.perf_counter()
        optimizer.step()
        print(time.perf_counter() - began, flush=True)


def files_of(revision: str, folder: Path) -> Path:
    """Puts those of a revision there."""
    packed = subprocess.run(["git", "archive", revision], cwd=HERE, capture_output=True, check=False)
    if packed.returncode:
        raise SystemExit(f"git archive {revision}: {packed.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def started(threads: int, tree: Path, model: str, kind: str) -> subprocess.Popen[str]:
    arguments = ["now", "--threads", str(threads), "--work", str(tree), model, kind]
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(process: subprocess.Popen[str], line: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit("a process ended: what it said is above")
    return float(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="what git calls the earlier one")
    parser.add_argument("--models", nargs="+", default=["20M"], choices=["20M", "124M"])
    parser.add_argument("--topk", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--contributors", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each case")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--work", nargs=3, metavar=("TREE", "MODEL", "KIND"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(Path(args.work[0]), args.work[1], args.work[2], args.threads)
        return
    print("| model | settings | k | contributors | " + " | ".join(f"{kind}, ms" for kind in KINDS), end=" |")
    print(" exact / before | before / kernels | exact / float |\n" + "|---" * 11 + "|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        before = files_of(args.revision, Path(folder))
        for model in args.models:
            trees = {kind: before if kind == "before" else HERE for kind in KINDS}
            processes = {kind: started(args.threads, tree, model, kind) for kind, tree in trees.items()}
            try:
                for setting in ("demo", "psyche"):
                    for k, contributors in ((k, c) for k in args.topk for c in args.contributors):
                        for process in processes.values():
                            ask(process, f"case {k} {contributors} {setting}")
                        times: dict[str, list[float]] = {kind: [] for kind in KINDS}
                        for _ in range(args.rounds):
                            for kind, process in processes.items():
                                times[kind].append(ask(process, "step"))
                        cells = [f"{1e3 * statistics.median(times[kind]):.0f}" for kind in KINDS]
                        for a, b in (("exact", "before"), ("before", "kernels"), ("exact", "float")):
                            ratio = statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
                            cells.append(f"{ratio:.2f}")
                        print(f"| {model} | {setting} | {k} | {contributors} | " + " | ".join(cells) + " |", flush=True)
            finally:
                for process in processes.values():
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    main()
