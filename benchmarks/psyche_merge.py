"""What a merge in Psyche's arithmetic costs against one in floats: a model in bfloat16, 1 to 8 contributors.

    python benchmarks/psyche_merge.py                      # GPT-2 small's shapes, signs; about 3 minutes on 2 cores
    python benchmarks/psyche_merge.py --values --threads 1
    python benchmarks/psyche_merge.py --model 20M --rounds 3

Both merges take turns in one process, on the same updates, so that a machine that slows down slows both. Printed are
the medians of the times, and of the ratios turn by turn: of the wall, and of the CPU seconds of all threads. That both
step alike but where a sum is nearly zero, whose sign bfloat16 may change, is checked in each case.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from shapes import MODELS, random_updates
from torch import Tensor

from distro_optim.compress import CompressedUpdate, ParamSpec, make_plan
from distro_optim.compress.engine import BlockEngine
from distro_optim.optim.workers import Workers

LR = 1e-3
KINDS = ("float", "psyche")
MOST_UNEQUAL = 0.1
"""Share of the weights that may have stepped otherwise: 4 in 100 do, and one half would in a merge that is wrong."""


def any_size(signs: Tensor) -> Tensor:
    """Values of these signs, as DeMo without its 1 bit sends them."""
    return torch.where(signs, 1, -1).mul(torch.randn(signs.shape).abs()).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="124M")
    parser.add_argument("--contributors", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--k", type=int, default=8, help="coefficients of a tile")
    parser.add_argument("--rounds", type=int, default=7, help="of each kind and case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--values", action="store_true", help="bfloat16 values in place of signs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    cpu = torch.device("cpu")
    shapes = MODELS[args.model]()
    specs = [ParamSpec(tuple(shape), torch.bfloat16, cpu, 0, 64, args.k) for shape in shapes]
    workers = Workers(args.threads)
    merges = {
        kind: BlockEngine(make_plan(specs, "divisor", arithmetic=kind), "dct", workers.run, workers.count)
        for kind in KINDS
    }
    start = [(torch.randn(shape) * 0.02).bfloat16() for shape in shapes]
    weights = {kind: [tensor.clone() for tensor in start] for kind in KINDS}
    plan, most = merges["float"].plan, max(args.contributors)
    updates = random_updates(plan, most, any_size) if args.values else random_updates(plan, most)
    count = sum(tensor.numel() for tensor in start)
    table = Table(
        title=f"{count / 1e6:.0f}M parameters in bfloat16, k={args.k}, {'values' if args.values else 'signs'}, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    for name in ("contributors", "float, ms", "psyche, ms", "ratio of the wall", "ratio of CPU seconds"):
        table.add_column(name, justify="right")
    for contributors in args.contributors:
        wall: dict[str, list[float]] = {kind: [] for kind in KINDS}
        busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for turn in range(args.rounds + 1):
            for kind, engine in merges.items():
                taken = [
                    CompressedUpdate(engine.plan, update.index, update.value, update.present)
                    for update in updates[:contributors]
                ]
                if not turn:
                    for tensor, first in zip(weights[kind], start, strict=True):
                        tensor.copy_(first)
                clock, seconds = time.perf_counter(), time.process_time()
                engine.merge(taken, weights[kind], lr=[LR])
                if turn:
                    wall[kind].append(time.perf_counter() - clock)
                    busy[kind].append(time.process_time() - seconds)
                elif kind == KINDS[-1]:
                    unequal = sum(int((a != b).sum()) for a, b in zip(*weights.values(), strict=True))
                    if unequal > MOST_UNEQUAL * count:
                        raise SystemExit(f"{unequal} of {count} weights differ: one of the two merges is wrong")
        ratios = [
            statistics.median(b / a for a, b in zip(times["float"], times["psyche"], strict=True))
            for times in (wall, busy)
        ]
        medians = [f"{1000 * statistics.median(wall[kind]):.0f}" for kind in KINDS]
        table.add_row(str(contributors), *medians, *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
