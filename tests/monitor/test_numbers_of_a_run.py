"""The numbers of a run, under the same names wherever a run is looked at."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from distro_optim.coordinator.rules.steps import with_round
from distro_optim.coordinator.server.host import RunHost
from distro_optim.coordinator.server.service import CoordinatorService
from distro_optim.coordinator.types import RunState
from distro_optim.serve.status import status_of
from distro_optim.serve.watch import Watch
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.monitor.figures import Progress, run_numbers
from distro_optim.strategy.monitor.metrics import metrics_of
from distro_optim.strategy.port import Contribution, RunView
from distro_optim.testing.coordinator import dummy_run
from frameworks.lightning_runs import QUIET, Runs, loader, make_module, make_trainer

pytestmark = [pytest.mark.waiting, *QUIET]

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
PEER = bytes([7]) * 32


def scraped(port: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_tokens_never_fall() -> None:
    state = RunConfig(total_steps=20, global_batch_size=4).coordinator_state("run")
    seen = Progress(bytes(32))
    begun = replace(state, run_state=RunState.ROUND_TRAIN)
    in_round = with_round(begun, replace(begun.current_round, data_index=40))
    trained = seen.figures(RunView(run_id="run"), in_round).total_tokens
    assert trained == 40 * state.model.max_seq_len
    assert seen.figures(RunView(run_id="run"), state).total_tokens == trained
    assert seen.figures(RunView(run_id="run"), None).total_tokens == trained


@pytest.mark.slow
def test_a_script_has_the_metrics_of_join_while_it_trains_and_logs_numbers_of_the_run(
    pl: ModuleType, runs: Runs, tmp_path: Path, strategy: Any
) -> None:

    told: list[str] = []
    pages: list[str] = []

    class Listener(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                [port] = [match[1] for text in told if (match := re.search(r"127.0.0.1:(\d+)/metrics", text))]
                pages.append(scraped(port))

    logger_class = load_csv_logger(pl)
    trainer = make_trainer(
        pl,
        tmp_path,
        strategy(pl, metrics_port=0, on_event=told.append),
        max_epochs=1,
        logger=logger_class(tmp_path),
        log_every_n_steps=1,
        callbacks=[Listener()],
    )
    trainer.fit(make_module(pl), loader())
    assert "psyche_total_tokens" in pages[0]
    assert "distro_optim_clients 1.0" in pages[0]
    assert trainer.progress_bar_metrics["peers"] == 1.0
    assert trainer.logged_metrics["run/peers"] == 1.0
    assert {name for name in trainer.logged_metrics if name.startswith("run/")} == set(
        run_numbers(Progress(PEER).figures(RunView(run_id="run"), None))
    )
    assert trainer.strategy.view().run_id == "quiet", "the view stays after fit"
    assert not any("waiting for" in text for text in told), "a host that needs nobody waits for nobody"
    assert "the run 'quiet'" in trainer.strategy.summary()


def load_csv_logger(pl: ModuleType) -> Any:
    return __import__(f"{pl.__name__}.loggers", fromlist=["CSVLogger"]).CSVLogger


@pytest.mark.parametrize("kind", ["RichProgressBar", "TQDMProgressBar"])
def test_a_bar_of_80_columns_shows_steps_loss_and_peers_in_one_line(
    kind: str, pl: ModuleType, strategy: Any, runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    bars = __import__(f"{pl.__name__}.callbacks", fromlist=[kind])
    bar, shown = getattr(bars, kind)(), []

    class Listener(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            shown.append(bar.get_metrics(trainer, module)["peers"])
            if kind == "RichProgressBar":
                screen = Console(file=io.StringIO(), width=80, force_terminal=True, _environ={})
                screen.print(bar.progress.get_renderable())
                lines = screen.file.getvalue().strip().splitlines()  # type: ignore[attr-defined]
                shown.extend(line for line in lines[1:] if line.strip())

    def training_step(module: Any, batch: Any, batch_idx: int) -> Any:
        loss = module.loss(batch)
        module.log("loss", loss, prog_bar=True)
        return loss

    trainer = make_trainer(
        pl, tmp_path, strategy(pl), max_epochs=1, enable_progress_bar=True, callbacks=[Listener(), bar]
    )
    trainer.fit(make_module(pl, training_step=training_step), loader())
    assert set(shown[1:]) == {"1"}, "and no line is broken"


def test_a_server_has_the_same_names_for_the_same_things() -> None:
    service = CoordinatorService(RunHost(dummy_run()), draw=lambda size: bytes(size), unix_offset=0.0)
    watch = Watch(service)
    assert watch.metrics() == []
    watch.see(status_of(service, 0.0))
    of_server = {metric.name for metric in watch.metrics()}
    view = RunView(run_id="run", waiting_peers=0, contributions={PEER: Contribution(rounds=1)})
    assert of_server <= {metric.name for metric in metrics_of(Progress(PEER).figures(view, None))}
    assert {"psyche_round_step", "psyche_total_tokens", "distro_optim_clients"} <= of_server


def test_contributions_are_labelled_with_the_identity() -> None:
    view = RunView(run_id="run", contributions={PEER: Contribution(rounds=3, samples=12, bytes=99, dropped=1)})
    by_name = {metric.name: metric.values for metric in metrics_of(Progress(PEER).figures(view, None))}
    assert by_name["distro_optim_contributed_samples"] == {"07" * 8: 12.0}
    assert by_name["distro_optim_contributed_dropped"] == {"07" * 8: 1.0}


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    view = RunView(run_id="run", lr=0.1, waiting_peers=0, contributions={PEER: Contribution(rounds=1)})
    figures = replace(Progress(PEER).figures(view, None), loss=1.0, tokens_per_second=1.0, efficiency=0.5)
    there = {m.name + ("_total" if m.kind == "counter" else "") for m in metrics_of(figures)}
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"(?:psyche|distro_optim)_\w+", target["expr"])
    }
    assert asked
    assert asked - there == set()


def test_the_dashboard_has_the_form_that_grafana_imports() -> None:
    """By Grafana's own description of a dashboard, ``kinds/dashboard/dashboard_kind.cue``, as far as ours goes."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] == 39, "a newer Grafana brings it up to date when it loads it"
    assert 8 <= len(dashboard["uid"]) <= 40
    assert isinstance(dashboard["title"], str)
    assert dashboard["time"].keys() == {"from", "to"}
    assert re.fullmatch(r"\d+[smh]", dashboard["refresh"])
    variables = {variable["name"]: variable["type"] for variable in dashboard["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query"}
    panels = dashboard["panels"]
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries"), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"].keys() == {"defaults", "overrides"}, panel["title"]
        place = panel["gridPos"]
        assert place.keys() == {"x", "y", "w", "h"}, panel["title"]
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= 24 - place["w"], "a row has 24 columns"
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        targets = panel["targets"]
        assert len({target["refId"] for target in targets}) == len(targets), panel["title"]
        for target in targets:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"job"}
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["expr"].count("{") == target["expr"].count("}")
