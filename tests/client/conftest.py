"""Data that a client trains on, made as a user makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.cli import main


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A file of tokens, made of a folder of texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(bytes(range(32, 64)) * 64)
    out = tmp_path / "tokens" / "a.bin"
    out.parent.mkdir()
    assert main(["tokenize", str(texts), "--tokenizer", "bytes", "--out", str(out)]) == 0
    return out
