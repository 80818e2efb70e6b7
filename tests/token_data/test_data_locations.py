"""From a run's ``data_location`` to its provider: every kind, and every way to be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.coordinator_swarm import key
from distro_optim.coordinator.formats.text import to_plain
from distro_optim.coordinator.model import (
    DontShuffle,
    DummyData,
    Gcp,
    HttpLLMTrainingDataLocation,
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
from distro_optim.data.making.corpus import Corpus
from distro_optim.data.making.tokenizing import tokenize
from distro_optim.data.making.vocabulary import ByteTokenizer
from distro_optim.data.mixture import WeightedTokens
from distro_optim.data.mixture_file import read_mixture
from distro_optim.data.mixture_index import MixtureIndex
from distro_optim.data.opening import open_token_data
from distro_optim.data.parquet import ParquetTokens, download_dataset
from distro_optim.data.remote.client import DataServerTokens
from distro_optim.data.token_files import TokenFiles
from distro_optim.data.web.tokens import HttpTokens
from distro_optim.errors import ConfigurationError, DataUnavailableError, InvalidDataError, MissingDependencyError
from token_data.arenas import SEED, SEQ_LEN, FilesArena, ParquetArena, RunningDataServer
from token_data.web_server import WebServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "mixture.json"

pytestmark = [pytest.mark.waiting]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[WebServer]:
    files = {
        f"/{name}/{number}.ds": tokens(first + 10 * number)
        for name, first in (("a", 0), ("b", 1000))
        for number in (0, 1)
    }
    with WebServer(files) as running:
        yield running


def tokens(first: int) -> bytes:
    """Two sequences of three tokens, and what a file behind HTTP has to spare."""
    return np.arange(first, first + 8, dtype="<u2").tobytes()


def numbered(url: str) -> HttpLLMTrainingDataLocation:
    return HttpLLMTrainingDataLocation(NumberedFiles(url + "/{}.ds", 0, 0, 2), TokenSize.TWO_BYTES, DontShuffle())


def firsts(provider: Any, count: int) -> list[int]:
    return [int(sample.input_ids[0]) for sample in provider.get_samples(BatchId(0, count - 1))]


# -- every kind ----------------------------------------------------------------------------------------------------


def test_dummy_data_are_2048_zeros_whatever_the_run_says() -> None:
    with open_token_data(DummyData(), 16) as provider:
        (sample,) = provider.get_samples(BatchId(2**64 - 1, 2**64 - 1))
        assert sample.input_ids.tolist() == [0] * 2048


def test_web_data_are_read_as_the_run_says(server: WebServer) -> None:
    with open_token_data(numbered(server.url + "/a"), 3) as provider:
        assert isinstance(provider, HttpTokens)
        assert firsts(provider, 4) == [0, 3, 10, 13]


def mixture_of(server: WebServer, *weights: float) -> dict[str, Any]:
    members: list[Any] = [to_plain(numbered(f"{server.url}/{name}")) for name in "ab"]
    if weights:
        members = [[member, weight] for member, weight in zip(members, weights, strict=True)]
    return {"shuffle": "DontShuffle", "providers": members}


@pytest.mark.parametrize(("weights", "expected"), [((), [0, 1000, 3, 1003]), ((3.0, 1.0), [0, 1000, 3, 10])])
def test_a_mixture_is_read_from_its_list(server: WebServer, weights: tuple[float, ...], expected: list[int]) -> None:
    server.files["/mix.json"] = json.dumps(mixture_of(server, *weights)).encode()
    with open_token_data(WeightedHttpData(server.url + "/mix.json"), 3, vocab_size=2000) as provider:
        assert isinstance(provider, WeightedTokens)
        assert provider.num_sequences == 8
        assert firsts(provider, 4) == expected


def test_a_data_server_is_asked_under_our_key() -> None:
    arena = FilesArena()
    with arena, arena.open() as files, RunningDataServer(files) as running:
        with open_token_data(ServerData(running.address), SEQ_LEN, key=key(1)) as provider:
            assert isinstance(provider, DataServerTokens)
            assert provider.get_samples(BatchId(1, 1))[0].input_ids.tolist() == arena.expected(1)


def test_preprocessed_data_come_from_a_folder_or_from_the_hub() -> None:
    with ParquetArena() as arena:
        with open_token_data(PreprocessedData(str(arena.path)), SEQ_LEN) as provider:
            assert isinstance(provider, ParquetTokens)
            assert provider.get_samples(BatchId(3, 3))[0].input_ids.tolist() == arena.expected(3)
        asked: list[str] = []

        def download(name: str) -> Path:
            asked.append(name)
            return arena.path

        with open_token_data(PreprocessedData("someone/something"), SEQ_LEN, download=download) as provider:
            assert provider.num_sequences == arena.count
        assert asked == ["someone/something"]


def test_local_data_say_themselves_how_wide_they_are(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abcdefghij" * 10)
    made = tmp_path / "made" / "a.bin"
    tokenize(Corpus(tmp_path / "texts"), ByteTokenizer(), made)
    for place in (made, made.parent):
        with open_token_data(LocalData(str(place)), 5) as provider:
            assert isinstance(provider, TokenFiles)
            assert bytes(provider.get_samples(BatchId(0, 0))[0].input_ids.astype(np.uint8)) == b"abcde"


def test_local_data_may_be_a_data_toml_with_an_order_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.arange(43, dtype="<u2").tobytes())
    seed = ", ".join(str(number) for number in SEED)
    (tmp_path / "data.toml").write_text(f'dir = "."\ntoken_size = "TwoBytes"\nseq_len = 4\nshuffle_seed = [{seed}]\n')
    location = LocalData(str(tmp_path / "data.toml"))
    with open_token_data(location, 4) as provider:
        assert firsts(provider, 10) == [4 * place for place in (3, 1, 2, 6, 7, 9, 8, 4, 5, 0)]
    with pytest.raises(ConfigurationError, match="makes sequences of 4 tokens, the run wants 8"):
        open_token_data(location, 8)


# -- every way to be wrong -----------------------------------------------------------------------------------------


def test_a_kind_of_location_that_nobody_knows_is_not_supported() -> None:
    location: Any = SimpleNamespace()
    with pytest.raises(ConfigurationError, match="of the kind SimpleNamespace are not supported: Dummy, Server"):
        open_token_data(location, 4)


def test_a_data_server_without_a_key_cannot_be_asked() -> None:
    with pytest.raises(ConfigurationError, match="which asks who we are: pass key"):
        open_token_data(ServerData("a:1"), 4)


def test_local_data_of_unknown_width_are_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(100))
    with pytest.raises(ConfigurationError, match="nothing says how wide the tokens"):
        open_token_data(LocalData(str(tmp_path)), 4)
    with open_token_data(LocalData(str(tmp_path)), 4, token_size=TokenSize.FOUR_BYTES) as provider:
        assert provider.num_sequences == 6


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (LocalData("/nowhere/at/all"), "cannot read token files in /nowhere/at/all"),
        (ServerData("somewhere"), "must be host:port"),
        (WeightedHttpData("mix.json"), "only http://, https:// and gs:// URLs can"),
        (
            HttpLLMTrainingDataLocation(SingleUrl("file:///etc/passwd"), TokenSize.TWO_BYTES, DontShuffle()),
            "only http://, https:// and gs:// URLs can",
        ),
    ],
)
def test_a_location_that_cannot_be_is_said_to_be_so(location: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        open_token_data(location, 4, key=key(1))


def test_one_bad_member_closes_the_mixture(server: WebServer) -> None:
    mixture = mixture_of(server, 1.0, 1.0)
    del server.files["/b/1.ds"]
    server.files["/mix.json"] = json.dumps(mixture).encode()
    with pytest.raises(DataUnavailableError, match=r"/b/1\.ds cannot be fetched: the server answers 404"):
        open_token_data(WeightedHttpData(server.url + "/mix.json"), 3)


def test_a_list_of_a_mixture_that_never_ends_is_not_read_to_its_end(server: WebServer) -> None:
    server.files["/mix.json"] = bytes(2 * 1024 * 1024)
    with pytest.raises(InvalidDataError, match="answers with 2097152 bytes"):
        open_token_data(WeightedHttpData(server.url + "/mix.json"), 3)


# -- the list of a mixture -----------------------------------------------------------------------------------------


def test_the_example_has_the_proportions_of_consiliences_data() -> None:
    mixture = read_mixture(EXAMPLE.read_bytes())
    assert mixture.weights == (14.0, 4.0, 1.0)
    assert [type(member.location) for member in mixture.members] == [NumberedFiles, NumberedFiles, Gcp]
    index = MixtureIndex([14_000, 4_000, 1_000], mixture.weights, mixture.shuffle)
    counts = Counter(index.locate(place)[0] for place in range(19_000))
    assert counts == {0: 14_000, 1: 4_000, 2: 1_000}


def test_psyches_own_example_is_understood() -> None:
    def member(port: int) -> dict[str, Any]:
        files = {
            "url_template": f"http://localhost:{port}/{{}}.ds",
            "start_index": 0,
            "n_left_pad_zeros": 3,
            "num_files": 2,
        }
        return {"location": {"NumberedFiles": files}, "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle"}

    plain = {"shuffle": {"Seeded": list(SEED)}, "providers": [[member(8000), 0.7], [member(8001), 0.3]]}
    mixture = read_mixture(json.dumps(plain))
    assert mixture.shuffle == Seeded(SEED)
    assert mixture.weights == (0.7, 0.3)
    assert mixture.members[1].location == NumberedFiles("http://localhost:8001/{}.ds", 0, 3, 2)
    unweighted = read_mixture(json.dumps({**plain, "providers": [member(8000)]}))
    assert unweighted.weights is None


MEMBER = {"location": {"SingleUrl": "http://a/"}, "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle"}


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ([], "no list 'providers'"),
        ({"shuffle": "DontShuffle"}, "no list 'providers'"),
        ({"shuffle": "Sometimes", "providers": [MEMBER]}, "Sometimes"),
        ({"shuffle": {"Seeded": [1, 2]}, "providers": [MEMBER]}, "wrong"),
        ({"shuffle": "DontShuffle", "providers": []}, "has 0 providers"),
        ({"shuffle": "DontShuffle", "providers": [MEMBER] * 1025}, "has 1025 providers"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, 1.0], MEMBER]}, "provider 1 is not a location and a weight"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, "much"]]}, "'much', which is not a number"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, True]]}, "which is not a number"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, -1]]}, "weights must be 0 or above"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, 10**400]]}, "too large"),
        ({"shuffle": "DontShuffle", "providers": [[MEMBER, 0]]}, "sum above 0"),
        ({"shuffle": "DontShuffle", "providers": [MEMBER, {**MEMBER, "shuffle": 5}]}, "provider 1: .*shuffle"),
        ({"shuffle": "DontShuffle", "providers": [{"location": "Moon"}]}, "provider 0"),
    ],
)
def test_a_list_that_is_wrong_names_the_place(plain: Any, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        read_mixture(json.dumps(plain))


@pytest.mark.parametrize(
    "text", [b"", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"shuffle": NaN, "providers": [NaN]}']
)
def test_what_is_no_list_at_all_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidDataError):
        read_mixture(text)


@pytest.mark.slow
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["shuffle", "providers", "location", "SingleUrl"]), inner)
        ),
    )
)
def test_arbitrary_json_is_a_list_or_a_clear_error(plain: Any) -> None:
    try:
        read_mixture(json.dumps(plain))
    except InvalidDataError:
        pass


# -- the hub -------------------------------------------------------------------------------------------------------


class FakeHub:
    """As much of ``huggingface_hub`` as is used."""

    def __init__(self, names: list[str], error: Exception | None = None) -> None:
        self._names = names
        self._error = error
        self.fetched: Any = None

    def HfApi(self) -> FakeHub:
        return self

    def list_repo_files(self, repo: str, *, repo_type: str) -> list[str]:
        assert repo_type == "dataset"
        if self._error is not None:
            raise self._error
        return self._names

    def snapshot_download(self, repo: str, *, repo_type: str, allow_patterns: list[str]) -> str:
        self.fetched = (repo, repo_type, allow_patterns)
        return "/cache"


def test_only_the_files_beside_the_first_one_are_downloaded() -> None:
    hub = FakeHub(["README.md", "data/train-1.parquet", "data/train-2.parquet", "other/train.parquet"])
    assert download_dataset("a/b", hub=hub) == Path("/cache/data")
    assert hub.fetched == ("a/b", "dataset", ["data/train-1.parquet", "data/train-2.parquet"])


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (FakeHub(["README.md"]), "data set 'a/b' has no parquet files"),
        (FakeHub([], OSError("404")), "data set 'a/b' cannot be downloaded: 404"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_named(hub: FakeHub, message: str) -> None:
    with pytest.raises(DataUnavailableError, match=message):
        download_dataset("a/b", hub=hub)


def test_without_pyarrow_the_command_that_brings_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'distro-optim\[parquet\]'"):
        open_token_data(PreprocessedData(str(tmp_path)), 4)


@pytest.mark.slow
def test_importing_the_room_loads_neither_aiohttp_nor_pyarrow() -> None:
    program = "import distro_optim.data.opening, sys; print(*{'aiohttp', 'yarl', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []
