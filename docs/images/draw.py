"""Draws the diagrams of the documentation, and the charts whose numbers stand in a table of a page.

    python docs/images/draw.py        # writes the SVG files of this folder again

The same input gives the same bytes, so a test can tell whether a picture still says what its page says.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

__all__ = ["drawings"]

DOCS = Path(__file__).parents[1]

BLUE, GREEN, ORANGE, GREY = "#dbe9fb", "#dcf3e1", "#fdeccf", "#eef0f3"
LINE, INK, SOFT = "#5b6b80", "#1d2733", "#56626f"
CURVES = ("#1f5fb4", "#b4451f", "#2b8a3e", "#8a5a00", "#7a3fa8", "#0b7f86", "#8c2346", "#4d4d4d")
BYTES_OF_A_SAMPLE = 128


class Drawing:
    """Boxes, arrows and texts on a white card; coordinates in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, text: str, fill: str = BLUE, *, size: int = 14) -> None:
        """A box with lines of text in its middle; the first one is bold if there are several."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{LINE}" stroke-width="1"/>'
        )
        lines = text.split("\n")
        first = y + h / 2 - (len(lines) - 1) * (size + 4) / 2 + size * 0.36
        for number, line in enumerate(lines):
            bold = number == 0 and len(lines) > 1
            self.text(x + w / 2, first + number * (size + 4), line, size=size if bold else size - 1, bold=bold)

    def frame(self, x: float, y: float, w: float, h: float, text: str) -> None:
        """A dashed frame with its name in the upper left corner."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="10" fill="none" '
            f'stroke="{LINE}" stroke-dasharray="5 4"/>'
        )
        self.text(x + 12, y + 20, text, bold=True, anchor="start")

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, bold: bool = False, anchor: str = "middle",
        color: str = INK,
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{color}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, path: str, label: str = "", at: tuple[float, float] = (0, 0), anchor: str = "middle") -> None:
        """An arrow along an SVG path, with a label of one or more lines."""
        self.parts.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#tip)"/>')
        for number, line in enumerate(label.split("\n") if label else []):
            self.text(at[0], at[1] + 15 * number, line, size=12, anchor=anchor, color=SOFT)

    def svg(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="Helvetica, Arial, sans-serif" role="img">',
                f"<title>{escape(self.title)}</title>",
                '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" rx="12" fill="#ffffff"/>',
                *self.parts,
                "</svg>",
                "",
            ]
        )


def how_it_works() -> Drawing:
    """What travels between two peers in a round."""
    d = Drawing(960, 430, "How a round works: peers send the few DCT coefficients that matter, one bit each")
    d.box(330, 18, 300, 56, "coordinator\nsays who trains which samples", ORANGE)
    for x, name in [(20, "peer 1: your script"), (640, "peer 2: a friend's")]:
        d.frame(x, 100, 300, 262, name)
        d.box(x + 30, 134, 240, 38, "forward, backward", BLUE)
        d.arrow(f"M{x + 150} 172 V198", "gradient, 248 MB", (x + 158, 190), "start")
        d.box(x + 30, 200, 240, 60, "DisTrO\nmomentum, DCT, largest, signs", BLUE)
        d.box(x + 30, 300, 240, 46, "weights -= lr x sign of the mean", GREEN)
    d.arrow("M330 46 H170 V96")
    d.arrow("M630 46 H790 V96")
    d.box(380, 170, 200, 120, "the internet\niroh: any router,\nno open port,\nverified blobs", GREY)
    d.arrow("M290 220 H376", "0.5 MB", (345, 211))
    d.arrow("M670 240 H584", "0.5 MB", (617, 231))
    d.arrow("M420 290 V323 H294", "all updates", (372, 341))
    d.arrow("M540 290 V323 H666", "all updates", (588, 341))
    d.text(
        480,
        396,
        "All peers apply the same updates in the same order, so their weights stay identical, bit for bit.",
        size=15,
    )
    d.text(
        480, 416, "While update t travels, step t+1 is computed. Sizes are those of 124 million parameters.", color=SOFT
    )
    return d


def pipeline() -> Drawing:
    """Which part of which round's work is done when."""
    d = Drawing(960, 350, "The pipeline: training, exchange and application of three rounds overlap")
    for number, name in enumerate(["round h-1", "round h", "round h+1"]):
        x = 150 + 265 * number
        d.text(x + 125, 34, name, size=14, bold=True)
    for y, name in [(62, "training"), (132, "network"), (202, "witnesses"), (272, "weights")]:
        d.text(20, y + 25, name, size=14, bold=True, anchor="start")
    texts = [
        (62, BLUE, ["train batch of h-1", "train batch of h", "train batch of h+1"]),
        (132, GREY, ["fetch results of h-2", "fetch results of h-1", "fetch results of h"]),
        (202, ORANGE, ["report on h-2", "report on h-1", "report on h"]),
        (272, GREEN, ["apply results of h-3", "apply results of h-2", "apply results of h-1"]),
    ]
    for y, fill, row in texts:
        for number, text in enumerate(row):
            d.box(150 + 265 * number, y, 235, 40, text, fill)
    d.arrow("M352 102 L442 130")
    d.arrow("M532 172 V198")
    d.arrow("M617 242 L700 270")
    d.text(480, 336, "The result of one batch on its way: trained, fetched, reported by a quorum, applied.", color=SOFT)
    return d


def phases() -> Drawing:
    """The phases of a run."""
    d = Drawing(960, 400, "The phases of a run")
    boxes = {
        "WaitingForMembers": (20, 130, 160), "Warmup": (260, 130, 110), "RoundTrain": (450, 130, 120),
        "RoundWitness": (640, 130, 130), "Cooldown": (840, 130, 100), "Paused": (260, 300, 110),
        "Finished": (640, 300, 130),
    }  # fmt: skip
    for name, (x, y, w) in boxes.items():
        d.box(
            x, y, w, 44, name, GREEN if name.startswith("Round") else ORANGE if name in ("Paused", "Finished") else BLUE
        )
    d.arrow("M100 60 V126", "the host writes a state", (20, 50), "start")
    d.arrow("M180 146 H256", "enough\npending", (218, 116))
    d.arrow("M370 152 H446", "all ready, or\nwarmup_time", (410, 116))
    d.arrow("M570 146 H636", "all reported,\nor time out", (604, 116))
    d.arrow("M770 152 H836", "epoch\nends", (803, 122))
    d.arrow("M705 130 C705 55 510 55 510 126", "next round", (608, 68))
    d.arrow("M315 130 C315 70 140 70 140 126", "too few clients", (240, 76))
    d.arrow("M890 174 V240 H60 V178", "cooldown_time is over", (480, 256))
    d.arrow("M890 174 V322 H774", "total_steps done", (780, 314), "start")
    d.arrow("M100 174 V316 H256", "pause", (175, 308))
    d.arrow("M290 174 V296", "pause", (298, 216), "start")
    d.arrow("M260 334 H40 V178", "resume", (150, 352))
    d.arrow("M370 322 H636", "resume, and total_steps are done", (500, 314))
    note = "From Cooldown a run also goes to Paused if that was asked for; from Warmup to Finished if too few clients "
    d.text(480, 390, note + "are left and total_steps are done.", size=12, color=SOFT)
    return d


def architecture() -> Drawing:
    """The rooms, each above those it may import."""
    d = Drawing(960, 640, "The rooms of the package: each imports only those below it")
    rows: list[tuple[int, list[tuple[str, str]]]] = [
        (36, [("cli\nthe command distro-optim", GREY)]),
        (
            46,
            [
                ("serve\ndistro-optim serve", GREY),
                ("client\ndistro-optim join", GREY),
                ("testnet\ndistro-optim testnet", GREY),
            ],
        ),
    ]
    y = 20
    for height, row in rows:
        w = (920 - 12 * (len(row) - 1)) / len(row)
        for number, (text, fill) in enumerate(row):
            d.box(20 + number * (w + 12), y, w, height + 10, text, fill)
        y += height + 22
    d.frame(20, y, 920, 216, "strategy: a training script as a peer of a run")
    d.box(
        40,
        y + 32,
        880,
        34,
        "PsycheStrategy, FabricPsycheStrategy, and frameworks/: what only Lightning and Fabric need",
        GREEN,
    )
    d.box(40, y + 74, 880, 34, "SwarmSession: the user's side, in the training thread", GREEN)
    d.box(40, y + 116, 434, 44, "model/\nthe weights in the training thread", GREEN)
    d.box(486, y + 116, 434, 44, "network/\na thread with an event loop", ORANGE)
    d.box(40, y + 168, 880, 38, "rounds/: which result counts, what to fetch, when to report. No I/O, no clock", BLUE)
    y += 228
    rows = [
        (36, [("testing: contracts and doubles", GREY)]),
        (44, [("models\nlanguage models", GREEN), ("data\ntoken data", GREEN)]),
        (44, [("coordinator\nthe run's state and its rules", ORANGE), ("optimizer, optim\nDisTrO", GREEN)]),
        (44, [("comm\nbytes and streams; iroh/: nodes, gossip, blobs, model sharing; serving/", ORANGE)]),
        (
            44,
            [
                ("verify\nBloom filters, commitments, Merkle trees", BLUE),
                ("compress\ntiles, DCT, top-k, signs, bytes", BLUE),
            ],
        ),
    ]
    for height, row in rows:
        w = (920 - 12 * (len(row) - 1)) / len(row)
        for number, (text, fill) in enumerate(row):
            d.box(20 + number * (w + 12), y, w, height, text, fill)
        y += height + 8
    d.text(
        480,
        y + 14,
        "buffer and errors lie below all of them. Blue: no I/O. Green: the training thread. Orange: the network.",
        size=12,
        color=SOFT,
    )
    d.height = y + 30
    return d


def convergence() -> Drawing:
    """Loss after 300 steps and bytes a step, from the table of the page."""
    page = (DOCS / "benchmarks" / "convergence.md").read_text(encoding="utf-8").partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d,]+) \| ([\d.]+) ± ([\d.]+) \|", page, re.M)
    d = Drawing(960, 60 + 56 * len(rows) + 40, "Validation loss after 300 steps, by method")
    d.text(
        20,
        32,
        "Validation loss after 300 steps, nats per byte: mean and standard deviation of 3 seeds",
        size=15,
        bold=True,
        anchor="start",
    )
    left, right, low, high = 300, 800, 2.0, 2.8
    scale = (right - left) / (high - low)
    for number, (name, sent, mean, deviation) in enumerate(rows):
        y = 56 + 56 * number
        d.text(20, y + 20, name, bold=True, anchor="start")
        d.text(20, y + 36, f"{sent} bytes a step", size=12, anchor="start", color=SOFT)
        x, spread = left + (float(mean) - low) * scale, float(deviation) * scale
        ring = f'fill="{BLUE}" stroke="{INK}" stroke-width="1.5"'
        d.parts.append(f'<circle cx="{x:.1f}" cy="{y + 21}" r="6" {ring}/>')
        d.parts.append(
            f'<path d="M{x - spread:.1f} {y + 21} H{x - 6:.1f} M{x + 6:.1f} {y + 21} H{x + spread:.1f} '
            f"M{x - spread:.1f} {y + 15} v12 "
            f'M{x + spread:.1f} {y + 15} v12" stroke="{INK}" stroke-width="1.5" fill="none"/>'
        )
        d.text(x + spread + 10, y + 26, f"{mean} ± {deviation}", anchor="start")
    y = 56 + 56 * len(rows)
    d.parts.append(f'<path d="M{left} 56 V{y} H{right}" stroke="{LINE}" fill="none"/>')
    for tick in range(9):
        x = left + tick * (right - left) / 8
        d.parts.append(f'<path d="M{x:.1f} {y} v5" stroke="{LINE}"/>')
        d.text(x, y + 20, f"{low + tick * 0.1:.1f}", size=12, color=SOFT)
    return d


def learning_curves() -> Drawing:
    """Loss over the bytes of text that were seen, and over those that each worker has sent."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    with (DOCS / "benchmarks" / "convergence.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            seen, sent = float(row["samples"]) * BYTES_OF_A_SAMPLE, float(row["bytes_sent"])
            curves.setdefault(row["method"], []).append((seen, sent, float(row["loss"])))
    d = Drawing(960, 480, "Loss over what was seen and over what was sent, by method, one seed")
    d.text(20, 30, "Validation loss, nats per byte, of one seed", size=15, bold=True, anchor="start")
    bottom, top, low, high = 420.0, 50.0, 2.0, 4.0
    y_of = _scale(low, high, bottom, top)
    ends = [(name, points[-1][2]) for name, points in curves.items()]
    for left, right, which, title in (
        (50.0, 400.0, 0, "bytes of text that all workers saw"),
        (440.0, 730.0, 1, "bytes that each worker sent"),
    ):
        values = [point[which] for points in curves.values() for point in points if point[which] > 0]
        first = 0.0 if which == 0 else math.floor(math.log10(min(values)))
        last = max(values) if which == 0 else math.ceil(math.log10(max(values)))
        x_of = _scale(first, last, left, right)
        ticks = [n * 1e5 for n in range(int(last / 1e5) + 1)] if which == 0 else list(range(int(first), int(last) + 1))
        for tick in ticks:
            d.parts.append(f'<path d="M{x_of(tick):.1f} {bottom} v5" stroke="{LINE}"/>')
            shown = f"{tick / 1000:g} kB" if which == 0 else _size(10.0**tick)
            d.text(round(x_of(tick), 1), bottom + 20, shown, size=11, color=SOFT)
        for tick in (2.0, 2.5, 3.0, 3.5, 4.0):
            d.parts.append(f'<path d="M{left} {y_of(tick):.1f} H{right}" stroke="{GREY}"/>')
            d.text(left - 8, y_of(tick) + 4, f"{tick:.1f}", size=11, anchor="end", color=SOFT)
        d.parts.append(f'<path d="M{left} {top} V{bottom} H{right}" stroke="{LINE}" fill="none"/>')
        d.text((left + right) / 2, bottom + 44, title, size=12, color=SOFT)
        for points, color in zip(curves.values(), CURVES, strict=False):
            shown_points = [
                (x_of(point[which] if which == 0 else math.log10(point[which])), y_of(point[2]))
                for point in points
                if point[2] <= high and point[which] > 0
            ]
            path = " L".join(f"{x:.1f} {y:.1f}" for x, y in shown_points)
            d.parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
            x, y = shown_points[-1]
            d.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    y = 0.0
    colors = dict(zip(curves, CURVES, strict=False))
    for name, loss in sorted(ends, key=lambda end: -end[1]):
        y = max(y + 34, y_of(loss) - 60)
        d.text(750, y, f"{loss:.3f}  {name}", size=12, anchor="start", color=colors[name])
    return d


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From values to pixels."""
    return lambda value: start + (value - low) * (end - start) / (high - low)


def _size(count: float) -> str:
    units: Sequence[tuple[float, str]] = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    for unit, name in units:
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count:g} B"


def drawings() -> dict[str, str]:
    """Name of each SVG file, and what belongs in it."""
    makers = [how_it_works, pipeline, phases, architecture, convergence, learning_curves]
    return {f"{maker.__name__}.svg": maker().svg() for maker in makers}


if __name__ == "__main__":
    for name, text in drawings().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
