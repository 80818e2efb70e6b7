"""Which methods are compared in which setting, and with which rates.

The rates of ``bytes`` and of both ``digits`` are what ``convergence.py --search`` found, with a seed that is not one of
the table; that of the recipe in ``bytes`` is of the simulation that found it. Other settings have the rates of
``bytes``, and AdamW besides with three others, of which the best counts: what is to be shown there is that the recipe
needs no other rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from learners.averaged import AdamWWorkers, MuonWorkers
from learners.base import Method, Variation, Workers
from learners.beyond import confirmed, tried
from learners.diloco import DiLoCoWorkers
from learners.package_text import VOCABULARY
from learners.plain import PlainWorkers
from learners.sparse_loco import SparseLoCoWorkers
from learners.swarm import DistroWorkers
from learners.tasks import BYTES, CONVOLUTIONS, LLAMA, TASKS, VISION_TRANSFORMER
from learners.varied import VariedWorkers

__all__ = ["EXACT", "LADDER", "PLAIN", "PLAIN_USED", "SETTINGS", "USED", "Run", "Setting", "has_a_twin", "make_workers"]

USED, EXACT = "float32", "float64"
PLAIN_USED, PLAIN = "plain twin, float32", "plain twin, float64"

LADDER = (1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2)
"""Rates that a search goes up and down."""

ADAMW = Method("AdamW + DDP", lr=5e-4)
MUON = Method("Muon + DDP", lr=1e-2)
DEMO = Method("DeMo k=32 values", lr=1e-3, topk=32, decay=0.999)
DEMO_SIGNS = Method("DeMo k=32 1-bit", lr=1e-3, topk=32, decay=0.999, quantize=True)
DISTRO = Method("DisTrO k=8 1-bit overlap", lr=1e-3, topk=8, decay=0.99, quantize=True, overlap=True)
RECIPE = Method(
    "recipe k=8 1-bit overlap",
    lr=3e-3,
    topk=8,
    decay=0.7,
    quantize=True,
    overlap=True,
    direction="orthogonal",
    update="rms",
)
ADAM_EMBEDDINGS = replace(RECIPE, name="recipe, embeddings by Adam", variation=Variation(adam_rows=VOCABULARY))
SMALL_TILES = replace(confirmed(RECIPE)[-1], name="recipe in tiles of 16, k=1")
# As many bytes as DisTrO sends in as many steps, or 14 % more: 3 times all weights in 300 steps.
DILOCO = Method("DiLoCo H=100 4-bit", lr=5e-4, local_steps=100, bits=4, outer_lr=0.7, outer_momentum=0.9)
SPARSE_LOCO = Method("SparseLoCo H=15 k=150 2-bit", lr=1e-3, topk=150, decay=0.95, local_steps=15, outer_lr=1.0)

_WORKERS = {
    ADAMW.name: AdamWWorkers,
    MUON.name: MuonWorkers,
    DILOCO.name: DiLoCoWorkers,
    SPARSE_LOCO.name: SparseLoCoWorkers,
}


@dataclass(frozen=True)
class Setting:
    """What is trained, by how many, and for how long.

    Attributes:
        batch_size: samples for each worker and step; windows of 128 bytes or 256 tokens, or images.
        looks: steps after which the loss is looked at.
        held_out: samples at such a look.
        tried: rates of AdamW besides its own, of which the best counts.
    """

    name: str
    task: str
    workers: int
    batch_size: int
    steps: int
    looks: tuple[int, ...]
    held_out: int
    methods: tuple[Method, ...]
    seeds: int = 3
    tried: tuple[float, ...] = ()

    def at(self, steps: int) -> Setting:
        """The same for another number of steps."""
        looks = {max(1, round(look * steps / self.steps)) for look in self.looks}
        return replace(self, steps=steps, looks=tuple(sorted(looks)))


_BYTES = Setting(
    "bytes",
    BYTES.name,
    workers=4,
    batch_size=2,
    steps=300,
    looks=(15, 30, 60, 100, 150, 200, 250, 300),
    held_out=256,
    methods=(ADAMW, MUON, DEMO, DEMO_SIGNS, DISTRO, RECIPE, DILOCO, SPARSE_LOCO),
)
_SCALED = replace(
    _BYTES.at(100),
    methods=(ADAMW, RECIPE, SMALL_TILES, MUON, *(replace(MUON, lr=lr) for lr in (5e-3, 2e-2, 5e-2)), DISTRO),
    tried=(1e-3, 2e-3, 3e-3),
    looks=(25, 50, 75, 100),
)
_OUTER_RATES = tuple(
    replace(method, name=f"{method.name}, outer {rate:g}", outer_lr=rate)
    for method, rates in ((DILOCO, (0.4, 0.7, 1.0)), (SPARSE_LOCO, (0.5, 0.75, 1.0, 1.5)))
    for rate in rates
)
_LLAMA = Setting(
    LLAMA.name,
    LLAMA.name,
    workers=4,
    batch_size=4,
    steps=300,
    looks=(15, 30, 60, 100, 150, 200, 250, 300),
    held_out=128,
    methods=(
        RECIPE,
        replace(ADAMW, lr=1e-3),
        MUON,
        DISTRO,
        SMALL_TILES,
        ADAM_EMBEDDINGS,
        replace(MUON, lr=2e-2),
        replace(MUON, lr=5e-3),
    ),
    seeds=1,
    tried=(5e-4, 2e-3, 4e-3),
)


def _digits(task: str, *rates: float) -> Setting:
    """The last rate is that of the recipe, in small tiles as well."""
    methods = (ADAMW, MUON, DISTRO, RECIPE, SMALL_TILES)
    return Setting(
        task,
        task,
        workers=4,
        batch_size=16,
        steps=150,
        looks=(10, 20, 30, 50, 75, 100, 125, 150),
        held_out=359,
        methods=tuple(replace(method, lr=lr) for method, lr in zip(methods, (*rates, rates[-1]), strict=True)),
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        _BYTES,
        _digits(CONVOLUTIONS.name, 3e-3, 5e-3, 5e-3, 2e-3),
        _digits(VISION_TRANSFORMER.name, 1e-2, 5e-3, 3e-3, 2e-3),
        _LLAMA,
        replace(_SCALED, name="bytes, 1 worker", workers=1),
        replace(_SCALED, name="bytes, 4 workers"),
        replace(_SCALED, name="bytes, 16 workers", workers=16),
        replace(_SCALED, name="bytes, 8 times the batch", batch_size=16),
        replace(_BYTES, name="bytes, outer rates", methods=_OUTER_RATES, seeds=1),
        replace(_BYTES, name="bytes, beyond", methods=confirmed(RECIPE)),
        replace(_BYTES.at(100), name="bytes, tried beyond", methods=(*confirmed(RECIPE), *tried(RECIPE)), seeds=1),
    )
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: as it is used; its plain twin; both without the chance of rounding.
    """

    setting: Setting
    method: Method
    kind: str
    seed: int

    @property
    def samples(self) -> int:
        """That all workers see."""
        return self.setting.workers * self.setting.batch_size * self.setting.steps


def has_a_twin(method: Method) -> bool:
    """Whether it is ``DisTrO``, by any rules."""
    return _family(method) not in _WORKERS and method.variation is None


def _family(method: Method) -> str:
    """Its name without what its variants differ in."""
    return method.name.partition(",")[0]


def make_workers(run: Run) -> Workers:
    """With the weights of torch's seed."""
    setting, method = run.setting, run.method
    task = TASKS[setting.task]
    if method.variation is not None:
        return VariedWorkers(task, method, setting.workers)
    if not has_a_twin(method):
        return _WORKERS[_family(method)](task, method, setting.workers)
    dtype = torch.float32 if run.kind in (USED, PLAIN_USED) else torch.float64
    if run.kind in (PLAIN, PLAIN_USED):
        return PlainWorkers(task, method, setting.workers, dtype)
    # In float64 to be compared with the plain twin, whose arithmetic is the published one.
    return DistroWorkers(task, method, setting.workers, dtype, "exact" if run.kind == USED else "float")
