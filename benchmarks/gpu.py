"""One GPU, at most eight minutes: are the kernels right there, and how far are they from what its memory allows?

    python benchmarks/gpu.py                        # on a GPU: all of it
    python benchmarks/gpu.py --models 124M          # on one with less than 40 GB
    python benchmarks/gpu.py --device cpu --toy     # without one: every part of it once, in Triton's interpreter

Right means: weights equal to those of the CPU in every bit, by torch and by the kernels. Times are medians of several
calls, between events of the GPU, of steps as Psyche's runs take them (overlap, lookahead, k=8, signs); beside them the
published DeMo (PyPI: pytorch_optimizer) and torch's AdamW. The memory's limit is measured too, by a copy. Each part
that fails says so, and the others go on. Send the output, or the file of ``--json``, with the name of the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

if "cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported for the first time

import torch
from rich.console import Console
from rich.table import Table
from shapes import gpt2_small, llama_1b
from torch import Tensor

from distro_optim import DisTrO
from distro_optim.compress import CompressedUpdate, OwnPart, ParamSpec, make_plan
from distro_optim.compress.engine import BlockEngine, Engine, Intake
from distro_optim.compress.engine.triton.batches import Ahead
from distro_optim.compress.engine.triton.engine import TritonEngine
from distro_optim.optim.rules import PUBLISHED

LR, KEEP, K = 1e-3, 0.999, 8

BYTES = {"check": 4.01, "extract": 12.32, "merge": 12.32, "step": 28.65, "step, 16 peers": 29.38}
"""Of memory that a float32 parameter costs in a part of a step: counted by ``tests/engines/counted_bytes.py``."""

LIMIT_OF_TARGET, FASTER_THAN_DEMO = 2.0, 5.0
"""What a step at 1.2 billion parameters should reach: so many times its bytes, so many times as fast as DeMo."""


MODELS = {"toy": lambda: [(64, 64), (70,)], "124M": gpt2_small, "1.2B": llama_1b}


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


class Bench:
    """Where it runs, how long it may, and what it has found.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        toy: so small that an interpreter gets through.
        seconds: after which no new part begins.
    """

    def __init__(self, device: str, *, toy: bool, seconds: float) -> None:
        self.device = torch.device(device)
        self.toy = toy
        self.console = Console(width=120)
        self.found: dict[str, Any] = {}
        self.failed: list[str] = []
        self._until = time.monotonic() + seconds
        self.bytes_per_ms = 0.0

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Does one part, unless the time is over."""
        if time.monotonic() > self._until:
            self.console.print(f"[yellow]{name}: left out, the time is over")
            return
        self.console.rule(name)
        try:
            work()
        except Exception as error:
            self.failed.append(name)
            self.console.print(f"[red]{name} failed: {type(error).__name__}: {error}")
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def ms(self, work: Callable[[], object]) -> float:
        """The median milliseconds of a call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        for _ in range(3):
            work()
        times = []
        for _ in range(7):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return statistics.median(times)

    def launches(self, work: Callable[[], object]) -> int | None:
        """Kernels and copies of a call; None without a GPU."""
        if self.device.type != "cuda":
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            work()
            torch.cuda.synchronize()
        return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")

    def table(self, title: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Prints rows, and keeps them."""
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(
                *(f"{cell:.3g}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row)
            )
        self.console.print(table)
        self.found[title] = {"columns": columns, "rows": rows}


class Peer:
    """All tensors of a peer in the middle of a step."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        specs = [ParamSpec(s, dtype, device, 0, 64, K) for s in shapes]
        self.plan = make_plan(specs, "padded", arithmetic="exact")
        self.size = sum(torch.Size(s).numel() for s in shapes)
        generator = torch.Generator(device).manual_seed(0)

        def noise(kind: torch.dtype, scale: float) -> list[Tensor]:
            return [torch.randn(s, generator=generator, device=device).mul_(scale).to(kind) for s in shapes]

        self.grads, self.weights, self.momenta = noise(dtype, 1e-3), noise(dtype, 0.02), noise(torch.float32, 1e-4)
        self.shifted = [torch.empty_like(w) for w in self.weights]
        self.own = []
        for number, grid in enumerate(self.plan.grids):
            index = torch.zeros(grid.tiles, self.plan.topk[number], dtype=torch.int32, device=device)
            index += torch.arange(self.plan.topk[number], dtype=torch.int32, device=device)
            self.own.append(OwnPart(index, torch.zeros(index.shape, device=device)))

    @property
    def intake(self) -> Intake:
        """Of a step."""
        return Intake(self.grads, self.momenta, [False] * len(self.plan), [LR], [KEEP], True, self.own)

    def others(self, count: int) -> list[CompressedUpdate]:
        """Updates of made-up peers; positions of a tile are distinct."""
        generator = torch.Generator("cpu").manual_seed(1)
        updates = []
        for _ in range(count):
            index, value = [], []
            for b in self.plan.batches:
                step = b.tile_size // b.k
                at = torch.randint(step, (b.tiles, b.k), generator=generator, dtype=torch.int32)
                index.append((at + step * torch.arange(b.k, dtype=torch.int32)).to(b.device))
                value.append((torch.rand(b.tiles, b.k, generator=generator) < 0.5).to(b.device))
            updates.append(CompressedUpdate(self.plan, tuple(index), tuple(value), (True,) * len(self.plan)))
        return updates


class Fused:
    """A whole step by the kernels as they can be captured in a graph: nothing waits, the lookahead is on the way."""

    def __init__(self, peer: Peer, others: list[CompressedUpdate]) -> None:
        self.peer = peer
        self.engine = TritonEngine(peer.plan, "dct")
        self.update = self.engine.room(quantize=True)
        self.others = others
        self.ahead = Ahead(peer.shifted, [LR])
        self.usable: dict[int, Tensor] = {}
        self.spoken: dict[int, Tensor] = {}

    def check(self) -> None:
        self.usable = self.engine.usable(self.peer.grads)

    def extract(self, precision: str = "split") -> None:
        self.spoken = self.engine.extract_into(self.update, self.peer.intake, self.usable, precision=precision)

    def merge(self) -> None:
        count = 1 + len(self.others)
        flags = {n: torch.stack([self.spoken[n]] * count) for n in self.spoken}
        self.engine.merge_into([self.update, *self.others], flags, self.peer.weights, [LR], ahead=self.ahead)

    def step(self) -> None:
        self.check()
        self.extract()
        self.merge()


# -- the parts ---------------------------------------------------------------------------------------------------------


def memory(bench: Bench) -> None:
    """The limit: a copy reads and writes."""
    size = 1 << (20 if bench.toy else 30)
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    bench.bytes_per_ms = 2 * size / bench.ms(lambda: target.copy_(source))
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "a CPU, interpreting"
    bench.console.print(f"{name}, PyTorch {torch.__version__}: {bench.bytes_per_ms / 1e6:.0f} GB/s")
    bench.found["machine"] = [name, torch.__version__, bench.bytes_per_ms / 1e6]


def correctness(bench: Bench) -> None:
    """Two steps by each engine on the device and by torch on the CPU, with the same updates."""
    cases: dict[str, tuple[list[tuple[int, ...]], torch.dtype, dict[str, Any], int]] = {
        "ragged, signs, 3 peers": ([(70, 100), (70,)], torch.float32, {}, 3),
        "bfloat16, values, k=32": ([(64, 64)], torch.bfloat16, {"quantize_1bit": False, "compression_topk": 32}, 2),
    }
    if not bench.toy:
        large = [(4096, 1024), (1000, 777), (64, 3, 3, 3), (1024,)]
        cases |= {
            "large, signs, 16 peers": (large, torch.float32, {}, 16),
            "large, values, k=64, 4 peers": (large, torch.float32, {"quantize_1bit": False, "compression_topk": 64}, 4),
            "large, divisor tiling": (large, torch.bfloat16, {"tiling": "divisor"}, 5),
        }
    rows = []
    for name, (shapes, dtype, settings, peers) in cases.items():
        made: dict[str, tuple[DisTrO, list[Tensor]]] = {}
        for where, engine, device in (
            ("CPU", "torch", torch.device("cpu")),
            ("torch", "torch", bench.device),
            ("kernels", "triton", bench.device),
        ):
            generator = torch.Generator().manual_seed(0)
            params = [
                torch.nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype).to(device)) for s in shapes
            ]
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(device)
            made[where] = DisTrO(params, lr=LR, engine=engine, **{**PUBLISHED, **settings}), params  # type: ignore[arg-type]
        reference, weights = made["CPU"]
        updates = []
        for _ in range(peers):
            updates.append(reference.download(reference.generate()))
            for p in weights:
                p.grad = torch.randn(p.shape).to(dtype)
        picks = 0
        for where, (optimizer, _) in made.items():
            if where != "CPU":
                first = optimizer.download(optimizer.generate())
                for mine, theirs in zip(first.index, updates[0].index, strict=True):
                    picks += int((mine.sort(1).values != theirs.sort(1).values).any(1).sum())
            optimizer.apply(updates)
            optimizer.apply(updates[::-1])
        row: list[Any] = [name, sum(w.numel() for w in weights)]
        for where in ("torch", "kernels"):
            row.append(sum(int((a.cpu() != b).sum()) for a, b in zip(made[where][1], weights, strict=True)))
        rows.append([*row, picks])
        if row[2] or row[3]:
            bench.failed.append(f"correctness: {name}")
    bench.table(
        "weights with other bits than on the CPU",
        ["case", "weights", "by torch", "by kernels", "tiles with other picks"],
        rows,
    )


def steps(bench: Bench, model: str) -> None:
    """Every stage by both engines, DeMo and AdamW, beside the memory's limit."""
    shapes = MODELS[model]()
    peer = Peer(shapes, bench.device)
    rows: list[list[Any]] = []

    def add(name: str, work: Callable[[], object], needed: float | None) -> float:
        took = bench.ms(work)
        limit = None if needed is None else needed * peer.size / bench.bytes_per_ms
        speed = None if needed is None else needed * peer.size / took / 1e6
        rows.append([name, took, bench.launches(work), limit, None if limit is None else took / limit, speed])
        return took

    fused = Fused(peer, [])
    fused.step()
    add("kernels: check", fused.check, BYTES["check"])
    add("kernels: extract", fused.extract, BYTES["extract"])
    add("kernels: merge and look ahead", fused.merge, BYTES["merge"])
    ours = add("kernels: whole step", fused.step, BYTES["step"])
    if not bench.toy:
        many = Fused(peer, peer.others(15))
        many.step()
        add("kernels: whole step, 16 peers", many.step, BYTES["step, 16 peers"])
        del many
    del fused
    blocks = BlockEngine(peer.plan, "dct")
    rows += by_torch(bench, peer, blocks)
    del blocks
    ratios = [f"step / memory limit: {rows[3][4]:.2f} (target: {LIMIT_OF_TARGET})"]
    with _weights_of(peer) as params:
        adamw = torch.optim.AdamW(params, lr=LR, fused=bench.device.type == "cuda")
        add("AdamW, fused", adamw.step, 28.0)
        del adamw
    try:
        from pytorch_optimizer import DeMo
    except ImportError:
        bench.console.print("[yellow]pytorch_optimizer is not installed: no published DeMo to compare with")
    else:
        from types import SimpleNamespace

        with _weights_of(peer) as params:
            demo = DeMo(params, lr=LR, compression_top_k=K)
            demo.process_group = SimpleNamespace(size=lambda: 1)
            took = add("published DeMo, k=8", demo.step, None)
            del demo
        ratios.append(f"published DeMo / step: {took / ours:.2f} (target: {FASTER_THAN_DEMO})")
    bench.table(
        f"{model}: milliseconds", ["", "ms", "launches", "limit of the memory", "times the limit", "GB/s"], rows
    )
    bench.console.print("; ".join(ratios))
    bench.found[f"{model}: targets"] = ratios


def by_torch(bench: Bench, peer: Peer, engine: Engine) -> list[list[Any]]:
    """Rows of the table of :func:`steps`."""
    update = engine.extract(peer.intake)
    many = len(peer.weights)
    stages: dict[str, Callable[[], object]] = {
        "extract": lambda: engine.extract(peer.intake),
        "merge": lambda: engine.merge([update], peer.weights, lr=[LR]),
        "look ahead": lambda: engine.shift(peer.weights, peer.momenta, peer.shifted, [LR] * many, [False] * many),
    }
    return [[f"torch: {n}", bench.ms(work), bench.launches(work), None, None, None] for n, work in stages.items()]


@contextmanager
def _weights_of(peer: Peer) -> Iterator[list[torch.nn.Parameter]]:
    """As parameters with gradients, without a copy of either."""
    params = [torch.nn.Parameter(weight) for weight in peer.weights]
    for param, grad in zip(params, peer.grads, strict=True):
        param.grad = grad
    yield params
    for param in params:
        param.grad = None


def choosing(bench: Bench, model: str) -> None:
    """torch.topk alone, which torch's way of a step needs and the kernels do not."""
    tiles = min(sum(torch.Size(shape).numel() for shape in MODELS[model]()) // 4096, 65536)
    block = torch.rand(tiles, 4096, device=bench.device)
    rows = [
        [k, took := bench.ms(lambda k=k: torch.topk(block, k, dim=1, sorted=False)), 1e6 * took / block.numel()]  # type: ignore[misc]
        for k in (8, 32)
    ]
    bench.table(f"torch.topk of {tiles} tiles", ["k", "ms", "ns per element"], rows)


def precisions(bench: Bench, model: str) -> None:
    """The transform in several precisions: what it costs, and which tiles pick other coefficients than in float32."""
    peer = Peer(MODELS[model](), bench.device)
    fused = Fused(peer, [])
    start = [m.clone() for m in peer.momenta]
    rows: list[list[Any]] = []
    reference: list[Tensor] = []
    for precision in ("ieee", "split") if bench.toy else ("ieee", "split", "tf32x3", "tf32"):
        for momentum, saved in zip(peer.momenta, start, strict=True):
            momentum.copy_(saved)
        for part in peer.own:
            part.value.zero_()
        fused.check()
        fused.extract(precision)
        picked = [index.sort(1).values for index in fused.update.index]
        reference = reference or picked
        others = sum(int((a != b).any(1).sum()) for a, b in zip(picked, reference, strict=True))
        rows.append([precision, bench.ms(lambda p=precision: fused.extract(p)), others])  # type: ignore[misc]
    bench.table(f"{model}: extraction by precision", ["precision", "ms", "tiles with other picks than ieee"], rows)


def graph(bench: Bench, model: str) -> None:
    """A step captured once and replayed: the same bits, and no time of the host."""
    if bench.device.type != "cuda":
        bench.console.print("needs CUDA")
        return
    peer = Peer(MODELS[model](), bench.device)
    fused = Fused(peer, [])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused.step()
    torch.cuda.current_stream().wait_stream(stream)
    changed = [*peer.momenta, *peer.weights, *(o.value for o in peer.own), *(o.index for o in peer.own)]
    start = [t.clone() for t in changed]
    fused.step()
    fused.step()
    eager = [w.clone() for w in peer.weights]
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        fused.step()
    for tensor, saved in zip(changed, start, strict=True):
        tensor.copy_(saved)
    captured.replay()
    captured.replay()
    others = sum(int((a != b).sum()) for a, b in zip(peer.weights, eager, strict=True))
    began = time.perf_counter()
    fused.step()
    host = 1e3 * (time.perf_counter() - began)
    rows = [["launched", bench.ms(fused.step), host], ["replayed", bench.ms(captured.replay), None]]
    bench.table(f"{model}: a graph, {others} weights differ after two replays", ["", "ms", "ms of the host"], rows)
    if others:
        bench.failed.append("graph: other bits")


def copies(bench: Bench, model: str) -> None:
    """What crosses the bus in a round: an update each way, and all weights, which are hashed on the host."""
    peer = Peer(MODELS[model](), bench.device)
    engine: Engine = TritonEngine(peer.plan, "dct")
    [update] = peer.others(1)
    here = engine.download(update)
    size = sum(t.numel() * t.element_size() for t in (*update.index, *update.value))
    rows: list[list[Any]] = [
        ["an update to the host", size / 1e6, took := bench.ms(lambda: engine.download(update)), size / took / 1e6],
        ["an update to the GPU", size / 1e6, took := bench.ms(lambda: engine.upload([here])), size / took / 1e6],
    ]
    weights = max(peer.weights, key=Tensor.numel)
    size = weights.numel() * weights.element_size()
    host = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=bench.device.type == "cuda")
    took = bench.ms(lambda: host.copy_(weights, non_blocking=True))
    rows.append(["the largest tensor to the host, pinned", size / 1e6, took, size / took / 1e6])
    took = bench.ms(weights.cpu)
    rows.append(["and pageable", size / 1e6, took, size / took / 1e6])
    bench.table(f"{model}: copies", ["", "MB", "ms", "GB/s"], rows)


def main() -> int:
    """Returns the exit code: 1 if anything was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="a few tiles")
    parser.add_argument("--models", default="124M,1.2B", help="of 124M and 1.2B")
    parser.add_argument("--seconds", type=float, default=420.0, help="after which no new part begins")
    parser.add_argument("--json", help="a file for all numbers")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: give --device cpu --toy")
    if options.device == "cpu" and not options.toy:
        parser.error("the interpreter takes a tenth of a second for each tile: give --toy")
    bench = Bench(options.device, toy=options.toy, seconds=options.seconds)
    models = ["toy"] if options.toy else options.models.split(",")
    bench.part("memory", lambda: memory(bench))
    bench.part("correctness", lambda: correctness(bench))
    for model in models:
        bench.part(f"steps, {model}", lambda m=model: steps(bench, m))  # type: ignore[misc]
    small = models[0]
    bench.part("top-k alone", lambda: choosing(bench, small))
    bench.part("precisions", lambda: precisions(bench, small))
    bench.part("graph", lambda: graph(bench, small))
    bench.part("copies", lambda: copies(bench, small))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"found": bench.found, "failed": bench.failed}, file, indent=1)
    bench.console.print(f"[red]wrong or failed: {', '.join(bench.failed)}" if bench.failed else "[green]all is well")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
