"""Time and memory of one optimizer step, beside the published DeMo (PyPI: pytorch_optimizer) and torch's AdamW.

    python benchmarks/optimizer_step.py            # all cases, about 15 minutes on 2 cores
    python benchmarks/optimizer_step.py --quick    # the 20M model only
    NUMBA_CPU_NAME=haswell python benchmarks/optimizer_step.py   # as on a machine with AVX2 and no AVX-512

Whole step = gradients to coefficients, decoding of everybody's coefficients, new weights. Contributors beyond the
first are made up and held locally: no network time is in any number. Compared optimizers take turns in one process,
so that a machine that slows down slows all of them; the ratios are taken turn by turn. Ours is measured with the
compiled kernels of ``distro-optim[fast]``, if they are there, and without. In the same turns, the memory floor: how
long a pass takes that only touches what every such step must (:mod:`memory_floor`). Every run first checks that both
implementations of DeMo choose the same coefficients and take the same step.

``--fastest`` takes the fastest turn of each instead of medians: for a machine that other programs use as well. There,
``--cpu-time`` counts the time of the cores, of all threads together, and not that of the clock. Threads of PyTorch
that wait for work would count: ``OMP_WAIT_POLICY=passive`` in the environment lets them sleep.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
from memory_floor import MemoryFloor, copy_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shapes import MODELS, gpt2_small, make_params, one_tensor, random_updates
from typing_extensions import override

from distro_optim import DisTrO
from distro_optim.comm.exchange import LocalExchange
from distro_optim.compress import CompressedUpdate, extraction
from distro_optim.compress.engine import BlockEngine
from distro_optim.compress.exact import merge as exact_merge
from distro_optim.compress.fast.loading import kernel
from distro_optim.optim import momentum as optimizer_momentum
from distro_optim.optim.rules import PUBLISHED

Tensors = list[torch.nn.Parameter]
LR = 1e-3
SETTINGS = ("demo", "psyche")


def made_up(optimizer: DisTrO, count: int) -> list[CompressedUpdate]:
    """Updates of ``count`` other peers, of the kind that ``optimizer`` sends."""
    if optimizer.generate().quantized:
        return random_updates(optimizer.plan, count)
    return random_updates(optimizer.plan, count, lambda signs: torch.where(signs, -1e-3, 1e-3))


class MadeUpExchange(LocalExchange):
    """Collects what was published, and with it what others have made up, who are at hand."""

    def __init__(self, others: list[CompressedUpdate]) -> None:
        super().__init__()
        self._others = others

    @property
    @override
    def num_peers(self) -> int:
        return 1 + len(self._others)

    @override
    def collect(self) -> list[CompressedUpdate]:
        return [*super().collect(), *self._others]


class Ours:
    """DisTrO with ``contributors`` updates held locally; without ``fast`` all of it is done by torch."""

    def __init__(
        self,
        params: Tensors,
        k: int,
        contributors: int,
        *,
        psyche: bool,
        fast: bool = True,
        arithmetic: Literal["exact", "float"] = "exact",
    ) -> None:
        if psyche:
            # Weights that look ahead between steps must be nobody else's: what others write to them would be found.
            grads = [param.grad for param in params]
            params = [torch.nn.Parameter(param.detach().clone()) for param in params]
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        self.optimizer = DisTrO(
            params,
            lr=LR,
            compression_topk=k,
            quantize_1bit=psyche,
            overlap=psyche,
            tiling="divisor",
            arithmetic=arithmetic,
            **PUBLISHED,
        )
        self._setting = "" if fast else "0"
        self._choose_engine()
        others = made_up(self.optimizer, contributors - 1) if contributors > 1 else []
        self.optimizer.exchange = MadeUpExchange(others)

    def _choose_engine(self) -> None:
        os.environ["DISTRO_OPTIM_FAST"] = self._setting

    def step(self) -> None:
        self._choose_engine()
        self.optimizer.step()


class Published:
    """pytorch_optimizer's DeMo, its all-gather replaced by made-up updates of the same number of contributors.

    With one contributor it takes a short cut of its own: the update is the part it has just removed from its momentum.
    """

    def __init__(self, params: Tensors, k: int, contributors: int) -> None:
        from pytorch_optimizer import DeMo

        self.optimizer = DeMo(params, lr=LR, compression_top_k=k)
        self.optimizer.process_group = SimpleNamespace(size=lambda: contributors)
        self.optimizer.demo_all_gather = self._gather
        self.picks: list[torch.Tensor] = []
        self._contributors = contributors
        self._others: list[torch.Tensor] = []
        self._compress = self.optimizer.compress.compress
        self._tile_sizes: list[tuple[int, int]] = []
        self.optimizer.compress.compress = self._record

    def _record(self, encoded: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
        index, value, shape = self._compress(encoded, k)
        self.picks.append(index)
        self._tile_sizes.append((index.numel(), encoded[0, 0].numel() if encoded.dim() > 2 else encoded.shape[-1]))
        return index, value, shape

    def _gather(self, index: torch.Tensor, value: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if not self._others:
            self._others = [
                torch.cat([torch.randint(tile, (count,)) for count, tile in self._tile_sizes])
                for _ in range(self._contributors - 1)
            ]
        return [index, *self._others], [value] * self._contributors

    def step(self) -> None:
        self.picks.clear()
        self._tile_sizes.clear()
        self.optimizer.step()


class AdamW:
    """torch.optim.AdamW as it comes: what a user would replace."""

    def __init__(self, params: Tensors) -> None:
        self.optimizer = torch.optim.AdamW(params, lr=LR)

    def step(self) -> None:
        self.optimizer.step()


def check_same_picks(shapes: list[tuple[int, ...]], k: int) -> str:
    """Steps both DeMo implementations from the same state; raises if they differ by more than ties."""
    ours_params, theirs_params = make_params(shapes), make_params(shapes)
    ours, theirs = Ours(ours_params, k, 1, psyche=False), Published(theirs_params, k, 1)
    update = ours.optimizer.generate()
    ours.optimizer.apply([update])
    theirs.step()
    tiles = differ = moved = wrong = 0
    for entry, index, a, b in zip(update.tensors(), theirs.picks, ours_params, theirs_params, strict=True):
        same = (entry.index.sort(-1).values.view(index.shape) == index.sort(-1).values).all(-1)
        tiles += same.numel()
        differ += int((~same).sum())
        moved += a.numel()
        wrong += int(((a - b).abs() > LR / 2).sum())
    if differ > 1e-3 * tiles or wrong > 1e-3 * moved:
        raise SystemExit(
            f"k={k}: picks differ in {differ} of {tiles} tiles, {wrong} of {moved} weights moved otherwise"
        )
    return f"picks equal in {tiles - differ} of {tiles} tiles, step equal in {moved - wrong} of {moved} weights"


def time_in_turns(
    runners: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each call, taking turns; one untimed turn first."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return times


def median_ratio(times: list[float], others: list[float]) -> float:
    """Turn by turn."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def fastest_ratio(times: list[float], others: list[float]) -> float:
    """Of the fastest turn of each: what is left where other programs disturb most turns."""
    return min(times) / min(others)


@contextmanager
def stage_clock() -> Iterator[dict[str, float]]:
    """Adds up seconds per stage of DisTrO's step while it is open."""
    spent: dict[str, float] = {}
    saved: list[tuple[object, str, object]] = []

    def wrap(owner: object, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start

        saved.append((owner, name, original))
        setattr(owner, name, timed)

    from distro_optim.compress.dct import DCT

    wrap(optimizer_momentum, "usable_gradients", "check gradients are finite")
    wrap(extraction, "load", "momentum into tiles")
    wrap(extraction, "select_topk", "top-k")
    wrap(DCT, "encode", "encode (dense)")
    wrap(DCT, "decode", "decode (dense)")
    wrap(DCT, "decode_sparse", "remove own / decode (sparse)")
    wrap(extraction, "store", "tiles into momentum")
    wrap(extraction, "store_sum", "tiles into momentum")
    wrap(exact_merge, "descend", "tiles into weights")
    wrap(exact_merge, "means_of_signs", "mean over contributors")
    wrap(exact_merge, "filtered_signs", "decode exactly")
    try:
        yield spent
    finally:
        for owner, name, original in saved:
            setattr(owner, name, original)


def peak_temporaries(build: Callable[[], Callable[[], None]]) -> int:
    """Most bytes held at once beyond what stood before, over the first two steps; scratch memory included."""
    step = build()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
        step()
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def exactness(steps: int = 100) -> tuple[float, float]:
    """Share of equal update signs against a float64 twin over ``steps``, and the error of delta in the end.

    Both run freely on the same gradients: low-rank structure plus noise, as a training run has.
    """
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(512, 256), (256, 256), (688, 256), (256,)]
    single = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    double = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    options = {"lr": LR, "compression_topk": 8, "overlap": False, "quantize_1bit": False}
    a, b = DisTrO(single, **options, **PUBLISHED), DisTrO(double, **options, **PUBLISHED)
    equal = total = 0
    for _ in range(steps):
        for p, q in zip(single, double, strict=True):
            grad = torch.randn(p.shape) * 1e-3
            if p.dim() == 2:
                grad += torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1]) * 1e-3
            p.grad, q.grad = grad, grad.double()
        ua, ub = a.generate(), b.generate()
        for x, y in zip(a.decode([ua]), b.decode([ub]), strict=True):
            equal += int((x.sign() == y.sign()).sum())
            total += x.numel()
    errors = [
        float((a.delta(p).double() - b.delta(q)).norm() / b.delta(q).norm())
        for p, q in zip(single, double, strict=True)
    ]
    return equal / total, max(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the 20M model only")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each case")
    parser.add_argument("--fastest", action="store_true", help="the fastest turn of each instead of medians")
    parser.add_argument("--cpu-time", action="store_true", help="time of all cores together, not of the clock")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="instead of both, or of what --quick takes")
    parser.add_argument("--topk", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--contributors", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--steps-only", action="store_true", help="no stages, memory, or twins")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("out/optimizer_step.json"), help="where the figures go too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="pytorch_optimizer")
    console = Console(width=None if sys.stdout.isatty() else 220)
    results: list[dict[str, object]] = []
    middle, relative = (min, fastest_ratio) if args.fastest else (statistics.median, median_ratio)

    of_turns = f"{'fastest' if args.fastest else 'median'} of {args.rounds}{', CPU time' if args.cpu_time else ''}"
    table = Table(title=f"One step, milliseconds ({of_turns}), {args.threads} threads")
    table.title = f"{table.title}; compiled kernels: {'yes' if kernel('merge') is not None else 'no'}"
    ours = ("DeMo", "Psyche", "DeMo, by torch", "Psyche, by torch")
    for column in ("model", "k", "contributors", "published DeMo", *(f"ours, {name}" for name in ours), "AdamW"):
        table.add_column(column, justify="right")
    table.add_column("times faster than DeMo: DeMo / Psyche settings", justify="right")
    table.add_column("than by torch", justify="right")
    table.add_column("by torch: exact / float", justify="right")
    for column in ("memory floor: DeMo / Psyche settings, copy", "ours over the floor", "published DeMo over it"):
        table.add_column(column, justify="right")
    models = args.models or (["20M"] if args.quick else ["20M", "124M"])
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("optimizer steps", total=len(models) * len(args.topk) * len(args.contributors))
        for model in models:
            shapes = MODELS[model]()
            params = make_params(shapes)
            for k in args.topk:
                progress.console.print(f"{model} k={k}: {check_same_picks(shapes, k)}")
                for contributors in args.contributors:
                    runners = {"published": Published(params, k, contributors).step}
                    for name in SETTINGS:
                        ours_of = partial(Ours, params, k, contributors, psyche=name == "psyche")
                        runners[name] = ours_of().step
                        runners[f"{name} by torch"] = ours_of(fast=False).step
                        runners[f"{name} by torch, float"] = ours_of(fast=False, arithmetic="float").step
                        runners[f"{name} floor"] = MemoryFloor(params, psyche=name == "psyche").step
                    runners["copy"] = copy_of(params)
                    runners["adamw"] = AdamW(params).step
                    clock = time.process_time if args.cpu_time else time.perf_counter
                    times = time_in_turns(runners, args.rounds, clock)
                    del runners
                    ms = {name: 1e3 * middle(t) for name, t in times.items()}

                    def each(name: str, other: str, times: dict[str, list[float]] = times) -> dict[str, float]:
                        return {s: relative(times[name.format(s)], times[other.format(s)]) for s in SETTINGS}

                    ratio, gain = each("published", "{}"), each("{} by torch", "{}")
                    price = each("{} by torch", "{} by torch, float")
                    above, most = each("{}", "{} floor"), each("published", "{} floor")
                    figures = {"ms": ms, "ratio": ratio, "gain": gain, "price": price, "above": above, "most": most}
                    results.append({"model": model, "k": k, "contributors": contributors, **figures})
                    table.add_row(
                        model,
                        str(k),
                        str(contributors),
                        *(
                            f"{ms[name]:.0f}"
                            for name in ("published", "demo", "psyche", "demo by torch", "psyche by torch", "adamw")
                        ),
                        f"{ratio['demo']:.1f} / {ratio['psyche']:.1f}",
                        f"{gain['demo']:.1f} / {gain['psyche']:.1f}",
                        f"{price['demo']:.2f} / {price['psyche']:.2f}",
                        f"{ms['demo floor']:.0f} / {ms['psyche floor']:.0f}, {ms['copy']:.0f}",
                        f"{above['demo']:.2f} / {above['psyche']:.2f}",
                        f"{most['demo']:.1f} / {most['psyche']:.1f}",
                    )
                    progress.console.print(
                        f"{model} k={k}, {contributors} contributors: "
                        + ", ".join(f"{name} {value:.0f} ms" for name, value in ms.items())
                        + f"; {ratio['demo']:.1f} and {ratio['psyche']:.1f} times faster, {gain['demo']:.1f} and "
                        + f"{gain['psyche']:.1f} times than by torch, where exact takes {price['demo']:.2f} and "
                        + f"{price['psyche']:.2f} times as long as float; {above['demo']:.2f} and "
                        + f"{above['psyche']:.2f} times the memory floor, which is {most['demo']:.1f} and "
                        + f"{most['psyche']:.1f} times faster than the published one"
                    )
                    progress.advance(task)
    console.print(table)
    if args.steps_only:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"steps": results}, indent=1))
        return

    model = models[-1]
    shapes = MODELS[model]()
    stages = Table(title=f"Stages of a step by torch without sharing out blocks, {model}, k=8, Psyche settings, ms")
    for column in ("stage", "1 contributor", "16 contributors"):
        stages.add_column(column, justify="left" if column == "stage" else "right")
    columns = []
    for contributors in (1, 16):
        ours = Ours(make_params(shapes), 8, contributors, psyche=True, fast=False)
        ours.step()
        # One block after the other: in threads, the stages of several blocks would overlap.
        ours.optimizer._run.engine = BlockEngine(ours.optimizer.plan, "dct")
        start = time.perf_counter()
        with stage_clock() as spent:
            ours.step()
        whole = time.perf_counter() - start
        spent["everything else"] = whole - sum(spent.values())
        columns.append(spent)
    for stage in sorted(set(columns[0]) | set(columns[1])):
        stages.add_row(stage, *(f"{1e3 * c.get(stage, 0.0):.0f}" for c in columns))
    console.print(stages)

    memory = {}
    for name, psyche in (("DeMo settings", False), ("Psyche settings", True)):
        memory[name] = peak_temporaries(lambda p=psyche: Ours(make_params(shapes), 8, 1, psyche=p).step)
    memory["published DeMo"] = peak_temporaries(lambda: Published(make_params(shapes), 8, 1).step)
    lines = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in memory.items())
    console.print(f"temporaries beyond parameters and state, {model}, k=8: {lines}")

    agreement, error = exactness()
    console.print(f"100 steps beside a float64 twin: {agreement:.4%} of update signs equal, delta off by {error:.1e}")

    tensors: dict[str, object] = {}
    if not args.quick:
        many, one = (
            Ours(make_params(gpt2_small()), 8, 1, psyche=True),
            Ours(make_params(one_tensor()), 8, 1, psyche=True),
        )
        times = time_in_turns({"many": many.step, "one": one.step}, args.rounds)
        cost = statistics.median(m / o for m, o in zip(times["many"], times["one"], strict=True))
        tensors = {"ratio": cost, "tensors": len(gpt2_small())}
        console.print(f"{len(gpt2_small())} tensors cost {cost:.2f} times one tensor of the same size")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {
                "steps": results,
                "stages_ms": [{k: 1e3 * v for k, v in c.items()} for c in columns],
                "temporaries_bytes": memory,
                "signs_equal": agreement,
                "delta_error": error,
                "many_tensors": tensors,
            },
            indent=1,
        )
    )
    console.print(f"figures written to {args.out}")


if __name__ == "__main__":
    main()
