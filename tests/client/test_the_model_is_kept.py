"""A client keeps the model without being told to: where, how much, and that no two write to one folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from distro_optim.client.keeping import kept_in, name_of_folder
from distro_optim.client.options import JoinOptions
from distro_optim.errors import ConfigurationError

OPTIONS = JoinOptions(run="psyche1abc")


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_run_has_a_folder_of_its_own_below_the_working_directory() -> None:
    with kept_in(OPTIONS, "ours") as ours, kept_in(OPTIONS, "others") as others:
        assert (ours, others) == (Path("out/join/ours"), Path("out/join/others"))
        assert Path("out/join/ours").is_dir()


def test_clients_of_one_run_have_folders_of_their_own_and_take_them_again() -> None:
    for _ in range(2):  # as after a restart: no folder more
        with kept_in(OPTIONS, "ours") as first, kept_in(OPTIONS, "ours") as second:
            assert (first, second) == (Path("out/join/ours"), Path("out/join/ours~2"))
    assert sorted(path.name for path in Path("out/join").iterdir()) == ["ours", "ours~2"]


def test_a_folder_that_was_named_is_taken_as_it_is(tmp_path: Path) -> None:
    with kept_in(JoinOptions(run="psyche1abc", checkpoint_dir=tmp_path / "mine"), "ours") as folder:
        assert folder == tmp_path / "mine"
    assert not Path("out").exists()


def test_nothing_is_written_if_nothing_is_to_be_kept(tmp_path: Path) -> None:
    with kept_in(JoinOptions(run="psyche1abc", no_checkpoints=True), "ours") as folder:
        assert folder is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc", "a/b", "a\\b", ".hidden", "a\0b", "x" * 500, "ä\x1b[2J"])
def test_a_strangers_name_stays_below_the_folder(name: str) -> None:
    with kept_in(OPTIONS, name) as folder:
        assert folder is not None
        assert folder.parent == Path("out/join")
        assert folder.resolve().parent == Path("out/join").resolve()
        assert len(folder.name) < 100


def test_names_that_had_to_be_changed_stay_different() -> None:
    names = ["a/b", "a_b", "a\\b", "x" * 65, "x" * 64, "ours~2", "ours"]
    assert len({name_of_folder(name) for name in names}) == len(names)
    assert name_of_folder("ours~2") != "ours~2"


def test_a_directory_that_cannot_be_written_to_is_told_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigurationError, match="--checkpoint-dir, or keep nothing with --no-checkpoints"):
        kept_in(OPTIONS, "ours").__enter__()
