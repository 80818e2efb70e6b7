"""The figures that a client shows, and the forms in which it shows them."""

from __future__ import annotations

import io
import json
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distro_optim.cli import main
from distro_optim.client.display import FORMS, record, render, status_line
from distro_optim.client.joining import join
from distro_optim.client.options import JoinOptions
from distro_optim.comm.swarm import PeerInfo
from distro_optim.console import JsonLines, PlainLines
from distro_optim.coordinator.types import BatchId
from distro_optim.errors import ConfigurationError, MissingDependencyError
from distro_optim.strategy.monitor.figures import Figures, Progress, StepClock
from distro_optim.strategy.monitor.metrics import MetricsServer, metrics_of
from distro_optim.strategy.monitor.summary import summary
from distro_optim.strategy.port import LossReport, RunView
from distro_optim.strategy.rounds.actions import DropReason

pytestmark = pytest.mark.waiting


PEER = PeerInfo(
    id=bytes(31) + b"\x07",
    is_neighbor=True,
    path="direct",
    rtt=0.0125,
    bytes_sent=10,
    bytes_received=20,
    send_rate=1500.0,
    receive_rate=500.0,
)
VIEW = RunView(
    run_id="my\x1brun",
    run_state="ROUND_TRAIN",
    epoch=2,
    step=17,
    total_steps=100,
    height=5,
    num_peers=3,
    peer_index=1,
    connected=True,
    lr=4e-4,
    bytes_sent=1_234_567,
    bytes_received=89,
    peers=(PEER,),
    neighbors=1,
    dropped={DropReason.DUPLICATE: 4},
    rounds_trained=16,
    losses={PEER.id: LossReport(step=16, loss=3.25)},
)


def moment(**changes: object) -> Figures:
    progress = Progress(bytes(32))
    progress.begins(17, BatchId(4, 7))
    progress.ends(2.0)
    return replace(progress.figures(VIEW, None), **changes)  # type: ignore[arg-type]


def drawn(figures: Figures) -> str:
    console = Console(width=160, file=io.StringIO(), force_terminal=False)
    console.print(render(figures))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_speed_is_that_of_the_latest_steps() -> None:
    clock = StepClock()
    assert clock.per_second(100) is None
    for step, now in enumerate([0.0, 2.0, 4.0], start=1):
        clock.saw(0, step, now, 0.5)
    assert clock.per_second(100) == 50.0
    assert clock.efficiency == 0.25


def test_what_lies_between_two_epochs_is_no_step() -> None:
    clock = StepClock()
    clock.saw(0, 1, 0.0, 0.0)
    clock.saw(0, 2, 1.0, 0.0)
    clock.saw(1, 3, 500.0, 0.0)
    assert clock.per_second(1) == 1.0


def test_perplexity_of_a_loss_that_is_no_number_is_none() -> None:
    assert moment().perplexity == pytest.approx(7.389, abs=1e-3)
    assert moment(loss=float("nan")).perplexity is None
    assert moment(loss=float("inf")).perplexity is None
    assert moment(loss=1e9).perplexity is None


def test_the_picture_shows_run_part_and_peers() -> None:
    picture = drawn(moment())
    for words in ("step 17/100", "B[4, 7]", "loss 2.0000", "3.2500", "direct, neighbour", "12.5 ms", "1.2 MB"):
        assert words in picture
    assert "\x1b" not in picture  # the run's name comes from a stranger


def test_the_picture_says_when_weights_are_in_doubt() -> None:
    assert "in doubt: too late" in drawn(moment(view=replace(VIEW, fault="too late")))


def test_a_line_has_what_matters() -> None:
    assert "step 17 of 100" in status_line(moment())
    assert "loss 2.0000" in status_line(moment())


def test_what_taking_part_costs_is_shown_wherever_it_costs_something() -> None:
    def fees_of(figures: Figures) -> list[float]:
        return [metric.values[""] for metric in metrics_of(figures) if metric.name == "distro_optim_fees_lamports"]

    free, paying = moment(), moment(view=replace(VIEW, fees=165_000))
    assert "fees" not in status_line(free) + drawn(free) + summary(free.view)
    assert record(free)["fees"] is None
    assert fees_of(free) == []
    for text in (status_line(paying), drawn(paying)):
        assert "fees 0.000165 SOL" in text
    assert "  fees          0.000165 SOL" in summary(paying.view).splitlines()
    assert record(paying)["fees"] == 165_000
    assert fees_of(paying) == [165_000]


def test_machines_get_one_object_a_line() -> None:
    stream = io.StringIO()
    lines = JsonLines(FORMS, stream, clock=lambda: 0.0)
    lines.tell("hello", {"key": "value"})
    lines.update(moment())
    lines.update(moment())  # not yet due again
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["event"], first["key"]) == ("note", "value")
    assert (second["event"], second["step"], second["batch"]) == ("status", 17, [4, 7])


def test_the_record_is_json_even_of_a_view_that_is_empty() -> None:
    assert json.loads(json.dumps(record(Progress(bytes(32)).figures(RunView(run_id="x"), None))))["loss"] is None


def test_lines_from_strangers_have_no_control_characters() -> None:
    stream = io.StringIO()
    PlainLines(FORMS, stream).tell("a\x1b[2Jb")
    assert "\x1b" not in stream.getvalue()


def test_prometheus_reads_the_figures() -> None:
    with MetricsServer(0, lambda: metrics_of(moment())) as server:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    assert "psyche_training_loss 2.0" in text
    assert "psyche_round_step 17.0" in text
    assert 'psyche_participating_in_round{role="not_in_round"} 1.0' in text
    assert 'distro_optim_dropped_total{reason="duplicate"} 4.0' in text
    assert "psyche_tokens_per_second" not in text  # not known yet


def test_a_port_that_is_taken_is_refused() -> None:
    with (
        MetricsServer(0, lambda: metrics_of(moment())) as server,
        pytest.raises(ConfigurationError, match="give another one"),
    ):
        MetricsServer(server.port, list)


@pytest.mark.slow
def test_without_the_extra_the_command_says_how_to_install_it_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # importing it fails
    key = tmp_path / "me.key"
    with pytest.raises(MissingDependencyError, match=r"pip install 'distro-optim\[metrics\]'"):
        join(JoinOptions(run="127.0.0.1:1/nobody", metrics_port=0, identity_secret_key_path=key))
    assert not key.exists()
    assert main(["join", "127.0.0.1:1/nobody", "-i", str(key), "--metrics-local-port", "0"]) == 1
    assert "pip install 'distro-optim[metrics]'" in capsys.readouterr().err
    assert not key.exists()
