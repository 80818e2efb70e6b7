"""``distro-optim tokenize``: a folder of texts becomes a file of tokens, however often it is interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import warm_python
from distro_optim.cli import main
from distro_optim.coordinator.model import TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.making import corpus as corpus_module
from distro_optim.data.making import tokenizing
from distro_optim.data.making.corpus import Corpus
from distro_optim.data.making.token_writer import Progress, TokenWriter
from distro_optim.data.making.tokenizing import TokenizeOptions, run_tokenize, tokenize
from distro_optim.data.making.vocabulary import ByteTokenizer, HfTokenizer, load_tokenizer
from distro_optim.data.sidecar import read_sidecar
from distro_optim.data.token_files import TokenFiles
from distro_optim.errors import ConfigurationError, InvalidDataError, MissingDependencyError

pytestmark = pytest.mark.waiting


TESTS = Path(__file__).parents[1]
TEXTS = {"b.txt": "second\n", "a/x.py": "first = 'ä'\n", "a/z.py": "third", "c.md": "fourth " * 400}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for name, text in TEXTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "empty.txt").touch()
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / "link.txt").symlink_to(root / "b.txt")
    return root


def tokens_of(path: Path, dtype: str = "<u2") -> list[int]:
    tokens: list[int] = np.fromfile(path, dtype=dtype).tolist()
    return tokens


EXPECTED = b"".join(TEXTS[name].encode() + b"\0" for name in ("a/x.py", "a/z.py", "b.txt", "c.md"))


def test_texts_follow_each_other_by_name_with_a_zero_after_each(folder: Path, tmp_path: Path) -> None:
    made = tokenize(Corpus(folder), ByteTokenizer(), tmp_path / "out.bin")
    assert tokens_of(tmp_path / "out.bin") == list(EXPECTED)
    assert (made.tokens, made.documents, made.vocab_size) == (len(EXPECTED), 4, 256)
    assert read_sidecar(tmp_path / "out.bin") == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.bin.json", "texts"]


def test_what_is_made_can_be_trained_on(folder: Path, tmp_path: Path) -> None:
    tokenize(Corpus(folder), ByteTokenizer(), tmp_path / "out.bin")
    with TokenFiles(tmp_path, TokenSize.TWO_BYTES, 16, vocab_size=256) as files:
        files.probe()
        assert bytes(files.get_samples(BatchId(0, 0))[0].input_ids.astype(np.uint8)) == EXPECTED[:16]


def test_only_files_of_the_wanted_names_are_texts(folder: Path, tmp_path: Path) -> None:
    corpus = Corpus(folder, ["*.py", "*.md"])
    assert [file.name for file in corpus.files()] == ["a/x.py", "a/z.py", "c.md"]
    assert corpus.num_skipped == 0
    assert Corpus(folder).num_skipped == 2


def test_the_output_is_no_text_of_its_own(folder: Path) -> None:
    options = TokenizeOptions(folder=folder, tokenizer="bytes", out=folder / "out.txt")
    quiet = Console(file=io.StringIO())
    first = run_tokenize(options, quiet)
    assert run_tokenize(options, quiet) == first
    assert tokens_of(folder / "out.txt") == list(EXPECTED)


# -- interruptions -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_a_killed_process_is_continued_to_the_same_bytes(folder: Path, tmp_path: Path, batches: int) -> None:
    (folder / "long.txt").write_text("".join(f"line {number}\n" for number in range(3000)))
    out = tmp_path / "out.bin"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
    command = [sys.executable, str(Path(__file__).with_name("kill_a_tokenizer.py")), str(folder), str(out)]
    status = warm_python.run([*command, str(batches)], env=environment, timeout=60, check=False).returncode
    assert status == -signal.SIGKILL
    assert not out.exists()
    assert warm_python.run([*command, "-1"], env=environment, timeout=60, check=False).returncode == 0
    expected = b"".join(
        (folder / name).read_bytes() + b"\0" for name in ("a/x.py", "a/z.py", "b.txt", "c.md", "long.txt")
    )
    assert tokens_of(out) == list(expected)
    assert [path.name for path in tmp_path.glob("out*")] in (["out.bin", "out.bin.json"], ["out.bin.json", "out.bin"])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("batches", range(1, 9))
def test_wherever_it_is_interrupted_it_goes_on(
    folder: Path, tmp_path: Path, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 500)
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 600)
    left = batches
    seen = []

    def interrupt(done: Progress) -> None:
        nonlocal left
        left -= 1
        seen.append(done.done)
        if left == 0:
            left = batches
            raise Interrupted

    out = tmp_path / "out.bin"
    for _ in range(50):
        try:
            tokenize(Corpus(folder), ByteTokenizer(), out, kept_every=1, on_progress=interrupt)
            break
        except Interrupted:
            assert not out.exists()
    assert tokens_of(out) == list(EXPECTED)
    assert seen == sorted(set(seen)), "something was done twice though it had been kept"


def test_what_was_not_kept_is_done_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "PIECE_BYTES", 500)
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 600)
    out = tmp_path / "out.bin"

    def interrupt(done: Progress) -> None:
        if done.done > 1000:
            raise Interrupted

    with pytest.raises(Interrupted):
        tokenize(Corpus(folder), ByteTokenizer(), out, kept_every=800, on_progress=interrupt)
    with open(tmp_path / "out.bin.partial", "ab") as file:
        file.write(b"half a tok")
    tokenize(Corpus(folder), ByteTokenizer(), out)
    assert tokens_of(out) == list(EXPECTED)


def half_done(folder: Path, out: Path) -> None:
    def interrupt(done: Progress) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        tokenize(Corpus(folder), ByteTokenizer(), out, kept_every=1, on_progress=interrupt)


def test_changed_texts_are_other_work(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    half_done(folder, out)
    (folder / "b.txt").write_text("changed")
    with pytest.raises(ConfigurationError, match="half of another work"):
        tokenize(Corpus(folder), ByteTokenizer(), out)
    made = tokenize(Corpus(folder), ByteTokenizer(), out, restart=True)
    assert tokens_of(out) == list(EXPECTED.replace(b"second\n", b"changed"))
    assert made.tokens == len(EXPECTED)
    (folder / "b.txt").write_text("changed again")
    with pytest.raises(ConfigurationError, match="is there already, and not of these texts"):
        tokenize(Corpus(folder), ByteTokenizer(), out)


def test_a_file_that_is_complete_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    made = tokenize(Corpus(folder), ByteTokenizer(), out)
    stamp = out.stat().st_mtime_ns
    assert tokenize(Corpus(folder), ByteTokenizer(), out) == made
    assert out.stat().st_mtime_ns == stamp
    assert not (tmp_path / "out.bin.partial").exists()


def test_a_file_of_somebody_else_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    out.write_bytes(b"precious")
    with pytest.raises(ConfigurationError, match="--restart to replace it"):
        tokenize(Corpus(folder), ByteTokenizer(), out)
    assert out.read_bytes() == b"precious"


def test_a_finished_file_that_was_cut_is_said_to_be(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    tokenize(Corpus(folder), ByteTokenizer(), out)
    os.truncate(out, 100)
    with pytest.raises(InvalidDataError, match="is cut"):
        tokenize(Corpus(folder), ByteTokenizer(), out)


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"work": 5}', b"[" * 60_000])
def test_damaged_progress_is_said_to_be(folder: Path, tmp_path: Path, damage: bytes) -> None:
    out = tmp_path / "out.bin"
    half_done(folder, out)
    (tmp_path / "out.bin.progress").write_bytes(damage)
    with pytest.raises(ConfigurationError, match="--restart to begin again"):
        tokenize(Corpus(folder), ByteTokenizer(), out)


def test_a_part_that_lost_its_end_is_said_to_have(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(tokenizing, "BATCH_BYTES", 1)
        left = 2

        def interrupt(done: Progress) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Interrupted

        with pytest.raises(Interrupted):
            tokenize(Corpus(folder), ByteTokenizer(), out, kept_every=1, on_progress=interrupt)
    os.truncate(tmp_path / "out.bin.partial", 2)
    with pytest.raises(ConfigurationError, match="is shorter than"):
        tokenize(Corpus(folder), ByteTokenizer(), out)


def test_two_processes_do_not_write_one_file(folder: Path, tmp_path: Path) -> None:
    corpus = Corpus(folder)
    goal = tokenize(corpus, ByteTokenizer(), tmp_path / "first.bin")
    with TokenWriter(tmp_path / "out.bin", goal), pytest.raises(ConfigurationError, match="another process is making"):
        tokenize(corpus, ByteTokenizer(), tmp_path / "out.bin")


# -- long texts ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=300).filter(lambda data: bool(data) and b"\0" not in data), st.integers(4, 40))
def test_pieces_make_up_the_text_again(data: bytes, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", size)
        patch.setattr(corpus_module, "_read", lambda path, offset, most: data[offset : offset + most])
        pieces = list(corpus_module._pieces(Path("x"), "x", 0))
        again = list(corpus_module._pieces(Path("x"), "x", pieces[-1].start))
    assert b"".join(piece.text for piece in pieces) == data
    assert all(0 < len(piece.text) <= size for piece in pieces)
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert again == pieces[-1:]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.integers(4, 40))
def test_no_piece_ends_within_a_character(text: str, size: int) -> None:
    data = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PIECE_BYTES", size)
        patch.setattr(corpus_module, "_read", lambda path, offset, most: data[offset : offset + most])
        assert "".join(piece.text.decode() for piece in corpus_module._pieces(Path("x"), "x", 0)) == text


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    line = b"0123456789abcde\n" * 65536  # a mebibyte
    peaks = []
    for megabytes in (8, 32):
        with open(root / "long.txt", "wb") as file:
            for _ in range(megabytes):
                file.write(line)
        corpus = Corpus(root)
        tracemalloc.start()
        made = tokenize(corpus, ByteTokenizer(), tmp_path / f"{megabytes}.bin")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made.tokens == megabytes * len(line) + 1
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 32 * 1024 * 1024


# -- tokenizers ----------------------------------------------------------------------------------------------------


def small_tokenizer(*, around: bool = False, specials: tuple[str, ...] = ("<s>", "</s>")) -> HfTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = [*specials, "<unk>", "first", "second", "third", "fourth", "=", "'", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(specials))
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    return HfTokenizer(tokenizer, "small")


def test_texts_are_neither_cut_nor_filled(folder: Path, tmp_path: Path) -> None:
    tokenize(Corpus(folder, ["c.md"]), small_tokenizer(), tmp_path / "out.bin")
    assert tokens_of(tmp_path / "out.bin") == [6] * 400 + [1]


def test_a_tokenizers_own_surroundings_of_a_text_are_kept(folder: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(around=True)
    assert (tokenizer.start, tokenizer.end) == ((0,), ())
    tokenize(Corpus(folder, ["b.txt", "z.py"]), tokenizer, tmp_path / "out.bin")
    assert tokens_of(tmp_path / "out.bin") == [0, 5, 0, 4]


def test_names_of_special_tokens_in_a_text_are_text(folder: Path, tmp_path: Path) -> None:
    (folder / "b.txt").write_text("first</s>second")
    tokenizer = small_tokenizer()
    tokenize(Corpus(folder, ["b.txt"]), tokenizer, tmp_path / "out.bin")
    tokens = tokens_of(tmp_path / "out.bin")
    assert tokens.index(1) == len(tokens) - 1


def test_a_tokenizer_json_is_found_by_its_folder(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "tiny"
    home.mkdir()
    (home / "tokenizer.json").write_text(small_tokenizer()._tokenizer.to_str())
    loaded = load_tokenizer(home)
    assert loaded.name == "tiny"
    assert loaded.digest == load_tokenizer(home / "tokenizer.json").digest == small_tokenizer().digest
    ended = load_tokenizer(home, end_token="<s>")
    assert ended.end == (0,)
    assert ended.digest != loaded.digest
    with pytest.raises(ConfigurationError, match="has no token '<end>'"):
        load_tokenizer(home, end_token="<end>")


def test_large_vocabularies_take_four_bytes(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(70_000)} | {"fourth": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = tokenize(Corpus(folder, ["c.md"]), HfTokenizer(tokenizer, "large"), tmp_path / "out.bin")
    assert made.token_size is TokenSize.FOUR_BYTES
    assert tokens_of(tmp_path / "out.bin", "<u4") == [70_000] * 400


def test_a_tokenizer_that_lies_about_its_vocabulary_is_found_out(folder: Path, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.vocab_size = 4
    with pytest.raises(InvalidDataError, match=r"makes the token \d of a/x.py, beyond its vocabulary of 4"):
        tokenize(Corpus(folder), tokenizer, tmp_path / "out.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is not a tokenizer at"), (b"{}", "is not a tokenizer"), (b"\x80\x04", "is not a tokenizer")],
)
def test_what_is_no_tokenizer_is_said_to_be_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load_tokenizer(path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)
    assert load_tokenizer("bytes").vocab_size == 256


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "out.bin"
    assert main(["tokenize", str(folder), "--tokenizer", "bytes", "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert f"{len(EXPECTED):,} tokens of 2 bytes from 4 texts, vocabulary of 256 (bytes); 2 files are not text" in said
    assert json.loads((tmp_path / "made" / "out.bin.json").read_text())["tokens"] == len(EXPECTED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--tokenizer", "bytes"], "nowhere is not a folder with texts"),
        ([".", "--tokenizer", "bytes", "--include", "*.none"], "has no text files called *.none"),
        ([".", "--tokenizer", "none.json"], "there is not a tokenizer at none.json"),
        ([".", "--tokenizer", "bytes", "--end-token", "x"], "ends texts with 0 and knows no other end"),
    ],
)
def test_a_wrong_command_is_one_clear_sentence(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["tokenize", *arguments, "--out", str(tmp_path / "out.bin")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
