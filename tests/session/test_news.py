"""News reach whoever runs a script: its own function, or where there is none, the log as Python shows it."""

from __future__ import annotations

import logging

import pytest

from distro_optim.strategy.environment import RunEnvironment
from distro_optim.strategy.news import News
from distro_optim.strategy.rounds import actions as act

SENTENCE = "the checkpoint of step 3 could not be saved"


def levels(log: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in log.records if record.name.startswith("distro_optim")]


def test_without_a_function_of_the_scripts_they_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    news = News(None, RunEnvironment())
    news.tell(SENTENCE)
    news.event(act.Desynced(step=3, reason="missed", tensors=()))
    assert SENTENCE in caplog.text
    assert levels(caplog) == [logging.WARNING] * 2


def test_what_happens_all_the_time_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    News(None, RunEnvironment()).event(act.ResultMissing(step=3, batches=()))
    assert levels(caplog) == [logging.INFO]


def test_what_the_script_is_told_is_not_shown_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distro_optim")
    told: list[str] = []
    News(told.append, RunEnvironment()).tell(SENTENCE)
    News(None, RunEnvironment(), quiet=True).tell(SENTENCE)  # another process of this machine
    assert told == [SENTENCE]
    assert levels(caplog) == [logging.INFO] * 2
