"""``benchmarks/wire_bytes.py`` finds every form of a real update as long as its definition says, and readable."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "wire_bytes.py"


@pytest.mark.slow  # trains three runs
def test_every_form_has_the_length_of_its_definition_and_comes_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parents[1])  # which the script does itself; undone at the end
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--steps", "2"])
    status = runpy.run_path(str(SCRIPT))["main"]()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "Psyche's form" in printed
