"""Points and audits in what remains of a run, on its page, and in a server's table."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from distro_optim.coordinator.rules.points import ClientAccount
from distro_optim.serve.console import Situation, record, render
from distro_optim.serve.status import ClientStatus, RunStatus
from distro_optim.strategy.monitor.figures import Progress
from distro_optim.strategy.monitor.picture import picture_of
from distro_optim.strategy.monitor.summary import summary
from distro_optim.strategy.port import RunView
from distro_optim.strategy.rounds.audits.docket import AuditCount
from distro_optim.verify.calibrate import TIGHTEST

ONE, TWO = bytes([0xAA] * 32), bytes([0xBB] * 32)
VIEW = RunView(
    run_id="run",
    clients=(ONE, TWO),
    audits={ONE: AuditCount(passed=5), TWO: AuditCount(passed=1, failed=1)},
    points={ONE: ClientAccount(samples=300, equal=500_000, work=1_000_000), TWO: ClientAccount(samples=20)},
)


def test_what_remains_of_a_run_says_who_failed_and_who_did_most() -> None:
    text = summary(VIEW)
    assert "audits        6 passed, of 2 peers; failed: bbbbbbbb" in text
    assert "    aaaaaaaa    1,000,000 by work,   500,000 in equal shares, 300 samples" in text
    assert "    bbbbbbbb            0 by work,         0 in equal shares, 20 samples" in text
    assert "nobody failed" in summary(RunView(run_id="run", audits={ONE: AuditCount(passed=5)}))


def test_what_remains_of_a_run_says_by_which_limits_momenta_were_audited() -> None:
    limits = replace(TIGHTEST, manhattan=0.0625, samples=40)
    text = summary(replace(VIEW, audit_limits=limits))
    assert "of momenta    at most 0.050 Jaccard, 0.005 Hamming, 0.062 Manhattan distance, learnt from 40 audits" in text
    assert "nothing can be said" in summary(replace(VIEW, audits_nothing=True))
    assert "of momenta" not in summary(VIEW)


def test_a_run_without_audits_and_points_says_nothing_of_them() -> None:
    text = summary(RunView(run_id="run"))
    assert "audit" not in text
    assert "points" not in text


def test_the_page_has_them_in_each_row() -> None:
    figures = Progress(ONE).figures(VIEW, None)
    rows = picture_of(figures, ticket=None, is_host=True, how_to_join=None)["peers"]
    assert [(row["points"], row["audits"]) for row in rows] == [(1_000_000, [5, 0]), (0, [1, 1])]


def test_a_servers_table_has_columns_for_points_only_where_they_are_counted() -> None:
    client = ClientStatus("aa" * 32, "here", "Healthy")
    status = RunStatus("run", "Training", 1, 0, 1, 9, 0, 0, 1, 0, 1, None, None, (client,))

    def shown(status: RunStatus) -> str:
        console = Console(width=140, file=io.StringIO(), record=True)
        console.print(render(Situation(status)))
        return console.export_text()

    assert "points" not in shown(status)
    counted = ClientStatus("aa" * 32, "here", "Healthy", samples=1200, equal=500_000, work=1_000_000)
    with_points = RunStatus("run", "Training", 1, 0, 1, 9, 0, 0, 1, 0, 1, None, None, (counted, client))
    assert all(text in shown(with_points) for text in ("1,200", "500,000", "1,000,000", "points: equal"))
    clients = record(Situation(with_points))["clients"]
    assert isinstance(clients, tuple | list)
    assert clients[0]["work"] == 1_000_000
