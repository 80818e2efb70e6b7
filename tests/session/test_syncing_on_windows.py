"""Windows syncs only files that are open for writing, and opens no folders."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from distro_optim.models import saving
from distro_optim.strategy.model import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="plays Windows elsewhere")


@pytest.mark.parametrize("module", [checkpoint, saving])
def test_files_and_folders_are_synced_as_windows_wants_it(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []

    def as_windows_opens(path: Path, flags: int) -> int:
        if path.is_dir():
            raise PermissionError(13, "Permission denied")
        synced.append(bool(flags & os.O_RDWR))
        return os.open(path, flags)

    windows = SimpleNamespace(
        name="nt", open=as_windows_opens, fsync=os.fsync, close=os.close, O_RDWR=os.O_RDWR, O_RDONLY=os.O_RDONLY
    )
    monkeypatch.setattr(module, "os", windows)
    (tmp_path / "file").write_bytes(b"weights")
    module._sync(tmp_path / "file")
    module._sync(tmp_path)
    assert synced == [True]
    assert (tmp_path / "file").read_bytes() == b"weights"
