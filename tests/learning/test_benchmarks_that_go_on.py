"""``benchmarks/convergence.py`` keeps what is finished, goes on from there, and says what the documents show."""

from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]


@pytest.fixture
def convergence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)  # of the examples; the benchmark puts it there itself
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("convergence")


@pytest.fixture
def done(convergence: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs that were executed; none really trains, and the best rate is 0.005."""
    runs: list[Any] = []

    def pretend(run: Any) -> Any:
        runs.append(run)
        loss = 2 + abs(run.method.lr - 0.005) + run.seed / 100
        return convergence.Result(run, [1, 2], [5.0, loss], 7.0, None, 0.1)

    monkeypatch.setattr(convergence, "execute", pretend)
    return runs


def bench(convergence: ModuleType, folder: Path) -> Any:
    return convergence.Bench(convergence.Results(folder), 1, Console(file=io.StringIO()))


def some_runs(convergence: ModuleType, seeds: int = 2) -> tuple[Any, list[Any]]:
    setting = convergence.SETTINGS["bytes"]
    return setting, convergence.runs_of(setting, setting.methods[:2], seeds, alone=True)


def test_what_is_finished_is_not_done_again(convergence: ModuleType, done: list[Any], tmp_path: Path) -> None:
    _, runs = some_runs(convergence)
    first = bench(convergence, tmp_path).results_of(runs[:3])
    assert done == runs[:3]
    everything = bench(convergence, tmp_path).results_of(runs)
    assert done == runs
    assert everything[:3] == first


def test_another_setting_or_rate_is_another_run(convergence: ModuleType, done: list[Any], tmp_path: Path) -> None:
    setting, (run, *_) = some_runs(convergence)
    others = [
        replace(run, setting=setting.at(100)),
        replace(run, method=replace(run.method, lr=0.1)),
        replace(run, seed=9),
        replace(run, kind=convergence.PLAIN),
    ]
    bench(convergence, tmp_path).results_of([run])
    bench(convergence, tmp_path).results_of(others)
    assert done == [run, *others]
    bench(convergence, tmp_path).results_of([replace(run, setting=replace(setting, seeds=9, methods=()))])
    assert len(done) == 5, "what else is compared does not matter"


def test_a_file_says_which_code_and_which_settings_it_is_of(
    convergence: ModuleType, done: list[Any], tmp_path: Path
) -> None:
    _, (run, *_) = some_runs(convergence)
    bench(convergence, tmp_path).results_of([run])
    [file] = tmp_path.rglob("*.json")
    kept = json.loads(file.read_text("utf-8"))
    assert kept["settings"]["method"]["name"] == run.method.name
    assert kept["settings"]["setting"]["workers"] == 4
    assert set(kept) >= {"revision", "torch", "date", "result"}


def test_a_search_climbs_the_ladder_until_the_best_rate_has_neighbours(
    convergence: ModuleType, done: list[Any], tmp_path: Path
) -> None:
    setting = convergence.SETTINGS["bytes"]
    adamw = setting.methods[0]
    assert adamw.lr == 5e-4
    convergence.search(setting, [adamw], bench(convergence, tmp_path), Console(file=io.StringIO()), tmp_path)
    assert [run.method.lr for run in done] == [2.5e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2]
    assert {run.seed for run in done} == {convergence.SEARCH_SEED}
    assert "**12.000**" in (tmp_path / "bytes rates.md").read_text("utf-8")


def test_the_table_and_the_ends_of_the_curves_say_the_same(
    convergence: ModuleType, done: list[Any], tmp_path: Path
) -> None:
    setting, runs = some_runs(convergence, seeds=3)
    results = bench(convergence, tmp_path).results_of(runs)
    assert convergence.show(setting, results, Console(file=io.StringIO()), tmp_path) == 0
    table, curves = ((tmp_path / f"bytes.{end}").read_text("utf-8") for end in ("md", "csv"))
    assert "| AdamW + DDP | 0.0005 | 7 | 2.014 ± 0.010 | +0.000 | 3 |" in table
    assert "| Muon + DDP | 0.01 | 7 | 2.015 ± 0.010 | +0.000 | 3 |" in table
    assert curves.splitlines()[1:3] == ["AdamW + DDP,8,7,5.0000", "AdamW + DDP,16,14,2.0145"]


def test_a_twin_in_float64_that_ends_elsewhere_is_wrong(
    convergence: ModuleType, done: list[Any], tmp_path: Path
) -> None:
    setting = convergence.SETTINGS["bytes"]
    recipe = next(method for method in setting.methods if method.name.startswith("recipe"))
    results = bench(convergence, tmp_path).results_of(convergence.runs_of(setting, [recipe], 1, alone=False))
    assert convergence.show(setting, results, Console(file=io.StringIO()), tmp_path) == 0
    apart = [replace(r, losses=[5.0, r.final_loss + 0.1 * (r.run.kind == convergence.PLAIN)]) for r in results]
    assert convergence.show(setting, apart, Console(file=io.StringIO()), tmp_path) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits by convolutions", "digits by a transformer"])
def test_every_method_takes_its_steps_in_a_setting(convergence: ModuleType, name: str, tmp_path: Path) -> None:
    setting = convergence.SETTINGS[name].at(2)
    results = bench(convergence, tmp_path).results_of(convergence.runs_of(setting, setting.methods, 1, alone=True))
    assert len(results) == len(setting.methods) == 5
    assert all(0 < result.final_loss < 3 for result in results)
    assert all(0 <= result.right <= 1 for result in results)
