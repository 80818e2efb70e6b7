"""``--data-mirror`` from what a user types to the sequences of a run whose own place is gone or lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.coordinator_swarm import key
from distro_optim.coordinator.formats.text import to_plain
from distro_optim.coordinator.messages import TokenizedData, TrainingData
from distro_optim.coordinator.model import (
    DontShuffle,
    DummyData,
    Gcp,
    HttpLLMTrainingDataLocation,
    LLMTrainingDataLocation,
    LocalData,
    NumberedFiles,
    PreprocessedData,
    Seeded,
    ServerData,
    SingleUrl,
    TokenSize,
    WeightedHttpData,
)
from distro_optim.coordinator.types import BatchId
from distro_optim.data.mirrors.places import MAX_MIRRORS, CopyOnDisk, mirror_of, name_of
from distro_optim.data.opening import open_token_data
from distro_optim.errors import ConfigurationError
from token_data.arenas import SEED, SEQ_LEN, RunningDataServer, ShuffledFilesArena
from token_data.test_data_servers_that_misbehave import Impostor, answering
from token_data.web_server import WebServer, status

pytestmark = [pytest.mark.waiting]

NOBODY = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def web() -> Iterator[WebServer]:
    files = {f"/{number}.ds": tokens(100 * number) for number in range(8, 12)}
    with WebServer(files) as running:
        yield running


def tokens(first: int) -> bytes:
    """Three sequences of three tokens and one token, of which three count on a disk and two behind a web server."""
    return np.arange(first, first + 10, dtype="<u2").tobytes()


def numbered(url: str, **changes: Any) -> HttpLLMTrainingDataLocation:
    files = NumberedFiles(url + "/{}.ds", 8, 0, 4)
    return replace(HttpLLMTrainingDataLocation(files, TokenSize.TWO_BYTES, Seeded(SEED)), **changes)


def contents(
    location: LLMTrainingDataLocation, *mirrors: str, seq_len: int = 3, count: int = 8
) -> tuple[list[list[int]], list[str]]:
    """The first sequences, and what was told."""
    told: list[str] = []
    with open_token_data(
        location, seq_len, vocab_size=60_000, key=key(1), mirrors=mirrors, tell=told.append
    ) as provider:
        provider.probe()
        samples = provider.get_samples(BatchId(0, count - 1))
    return [sample.input_ids.tolist() for sample in samples], told


def data_file(arena: ShuffledFilesArena) -> str:
    path = arena.path / "data.toml"
    path.write_text(f'dir = "."\ntoken_size = "FourBytes"\nseq_len = {SEQ_LEN}\nshuffle_seed = {list(SEED)}\n')
    return str(path)


# -- a data server -------------------------------------------------------------------------------------------------


def test_a_data_server_that_is_gone_is_replaced_by_the_same_data_on_our_disk() -> None:
    with ShuffledFilesArena() as arena:
        found, told = contents(ServerData(NOBODY), data_file(arena), seq_len=SEQ_LEN)
        assert found == arena.content[:8]
        assert len(told) == 1
        assert told[0].startswith(f"training data: the data server {NOBODY} gives nothing: ")


def test_a_data_server_that_lies_is_replaced_by_another() -> None:
    def lie(batch: BatchId) -> TrainingData:
        return TrainingData(batch, (TokenizedData((1,) * (SEQ_LEN - 1)),) * len(batch))

    arena = ShuffledFilesArena()
    with arena, arena.open() as files, RunningDataServer(files) as server, Impostor(answering(lie)) as liar:
        found, told = contents(ServerData(liar.address), server.address, seq_len=SEQ_LEN)
        assert found == arena.content[:8]
        assert len(told) == 1
        assert "gives what cannot be the run's data" in told[0]


def test_two_copies_outvote_a_data_server_whose_lies_could_be_true() -> None:
    def lie(batch: BatchId) -> TrainingData:
        return TrainingData(batch, (TokenizedData((1,) * SEQ_LEN),) * len(batch))

    arena = ShuffledFilesArena()
    with arena, arena.open() as files, RunningDataServer(files) as server, Impostor(answering(lie)) as liar:
        found, told = contents(ServerData(liar.address), data_file(arena), server.address, seq_len=SEQ_LEN)
        assert found == arena.content[:8]
        assert len(told) == 1
        assert f"the data server {liar.address} gives other data than the rest" in told[0]


# -- web servers ---------------------------------------------------------------------------------------------------


def test_files_of_a_web_server_that_is_gone_are_read_at_another(web: WebServer) -> None:
    expected, told = contents(numbered(web.url))
    assert told == []
    found, told = contents(numbered(web.url + "/gone"), f"{web.url}/{{}}.ds")
    assert found == expected
    assert told[0].startswith(f"training data: {web.url}/gone/{{}}.ds gives nothing")


def test_files_on_our_disk_are_counted_and_ordered_as_those_behind_a_web_server(web: WebServer, tmp_path: Path) -> None:
    for name, content in web.files.items():
        (tmp_path / name[1:]).write_bytes(content)
    expected, _ = contents(numbered(web.url))
    found, told = contents(numbered(web.url + "/gone"), str(tmp_path))
    assert found == expected
    assert len(told) == 1
    with pytest.raises(ConfigurationError, match=r"no file 8\.ds"):
        contents(numbered(web.url + "/gone"), str(tmp_path.parent))


def test_a_web_server_that_fails_in_the_middle_does_not_end_it(web: WebServer) -> None:
    expected, _ = contents(numbered(web.url))
    with WebServer(dict(web.files)) as other:
        web.always["GET"] = status(404)
        found, told = contents(numbered(web.url), f"{other.url}/{{}}.ds")
        assert found == expected
        assert len(told) == 1


def test_a_web_server_whose_files_are_longer_is_told_of(web: WebServer) -> None:
    one = HttpLLMTrainingDataLocation(SingleUrl(web.url + "/8.ds"), TokenSize.TWO_BYTES, DontShuffle())
    with WebServer({"/x.ds": web.files["/8.ds"] + bytes(60)}) as longer:
        found, told = contents(one, longer.url + "/x.ds", count=2)
    assert found == [[800, 801, 802], [803, 804, 805]]
    assert len(told) == 1
    assert "and the run's data have 2" in told[0]


def test_a_mixture_has_another_list_as_its_mirror(web: WebServer) -> None:
    members = [to_plain(numbered(web.url))]
    web.files["/mix.json"] = json.dumps({"shuffle": "DontShuffle", "providers": members}).encode()
    expected, _ = contents(WeightedHttpData(web.url + "/mix.json"))
    found, told = contents(WeightedHttpData(web.url + "/gone.json"), web.url + "/mix.json")
    assert found == expected
    assert len(told) == 1


# -- what users type -----------------------------------------------------------------------------------------------


def http(where: SingleUrl | NumberedFiles | Gcp) -> HttpLLMTrainingDataLocation:
    return HttpLLMTrainingDataLocation(where, TokenSize.TWO_BYTES, DontShuffle())


SINGLE = http(SingleUrl("https://a.example/x.bin"))
MANY = numbered("https://a.example")
BUCKET = http(Gcp("bucket", "folder"))


@pytest.mark.parametrize(
    ("location", "place", "mirror"),
    [
        (ServerData("a:1"), "b:2", ServerData("b:2")),
        (SINGLE, "https://b.example/y.bin", http(SingleUrl("https://b.example/y.bin"))),
        (SINGLE, "gs://b/y.bin", http(SingleUrl("gs://b/y.bin"))),
        (MANY, "http://b/y-{}.ds", numbered("", location=NumberedFiles("http://b/y-{}.ds", 8, 0, 4))),
        (BUCKET, "gs://other/place", http(Gcp("other", "place"))),
        (WeightedHttpData("https://a/m.json"), "https://b/m.json", WeightedHttpData("https://b/m.json")),
    ],
)
def test_a_mirror_is_read_as_the_run_reads_its_own_place(
    location: LLMTrainingDataLocation, place: str, mirror: LLMTrainingDataLocation
) -> None:
    assert mirror_of(location, place) == mirror


@pytest.mark.parametrize(
    ("location", "place", "message"),
    [
        (ServerData("a:1"), "https://b/y.bin", "are at a data server, of which a mirror is HOST:PORT of another"),
        (ServerData("a:1"), ".", "are at a data server, of which a mirror is HOST:PORT of another one, or a data.toml"),
        (ServerData("a:1"), "missing/data.toml", "are at a data server"),
        (ServerData("a:1"), "nonsense", "must be host:port"),
        (SINGLE, "https://", "training data cannot be fetched from"),
        (SINGLE, "missing.bin", "neither a URL .* nor a file or folder of this machine"),
        (MANY, "missing", "neither a URL .* nor a folder"),
        (MANY, "https://b/y.ds", "are 4 numbered files, of which a mirror is a URL with {} where the number goes"),
        (BUCKET, "https://b/y", "are in a bucket, of which a mirror is gs://BUCKET/FOLDER"),
        (WeightedHttpData("https://a/m.json"), "m.json", "are a mixture, of which a mirror is the URL of another list"),
        (LocalData("x"), "y", "on your own disk or made up"),
        (PreprocessedData("x"), "y", "leave it out"),
        (DummyData(), "y\x1b[2J", r"--data-mirror y\?\[2J: "),
    ],
)
def test_a_place_that_cannot_have_such_data_is_refused_with_one_that_can(
    location: LLMTrainingDataLocation, place: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        mirror_of(location, place)


def test_too_many_mirrors_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="17 mirrors of the training data are too many"):
        open_token_data(ServerData(NOBODY), 3, key=key(1), mirrors=[NOBODY] * (MAX_MIRRORS + 1))


def test_a_run_cannot_make_us_read_beside_the_folder_that_we_name(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(tokens(0))
    (tmp_path / "data").mkdir()
    for url in ("https://a/..", "https://a/../secret", "https://a/", "https://a/x?/../secret"):
        with pytest.raises(ConfigurationError, match="has no file"):
            mirror_of(http(SingleUrl(url)), str(tmp_path / "data"))


def test_names_of_places_hold_no_password_and_nothing_that_cannot_be_printed() -> None:
    assert name_of(http(SingleUrl("https://me:secret@a.example/x.bin?key=1"))) == "https://a.example/x.bin?..."
    assert name_of(ServerData("a\x1b[2J:1")) == "the data server a?[2J:1"
    assert name_of(BUCKET) == "gs://bucket/folder"
    assert name_of(CopyOnDisk((Path("a/b.ds"), Path("a/c.ds")), TokenSize.TWO_BYTES, DontShuffle())) == "a"
