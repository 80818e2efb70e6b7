"""The picture of the page on convergence is of the same runs as its table."""

from __future__ import annotations

import csv
import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "benchmarks"


def test_every_curve_ends_where_the_table_says_that_this_seed_ended() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [\d.]+ \| ([\d,]+) \| [^|]+ \| [^|]+ \| ([\d.]+) \|$",
        (PAGES / "convergence.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    told = {name: (loss, sent.replace(",", "")) for name, sent, loss in rows}
    ends: dict[str, tuple[str, str]] = {}
    with (PAGES / "convergence.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            steps = float(row["samples"]) / 8
            ends[row["method"]] = f"{float(row['loss']):.3f}", f"{float(row['bytes_sent']) / steps:.0f}"
    assert ends == told
    assert len(ends) >= 5
