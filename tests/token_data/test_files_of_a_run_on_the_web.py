"""Which URLs a location means: one, numbered files, and what a bucket lists."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.coordinator.model import Gcp, NumberedFiles, Seeded, SingleUrl, TokenSize
from distro_optim.coordinator.types import BatchId
from distro_optim.data.web.client import WebClient
from distro_optim.data.web.files import (
    WebFile,
    file_urls,
    listing_url,
    plain_url,
    read_content_range,
    read_listing,
    shown,
)
from distro_optim.data.web.tokens import HttpTokens, find_web_files
from distro_optim.errors import ConfigurationError, InvalidDataError
from token_data.arenas import never_wait
from token_data.web_server import Handler, WebServer

pytestmark = [pytest.mark.waiting]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def client() -> Iterator[WebClient]:
    made = WebClient(wait=never_wait)
    yield made
    made.close()


def test_numbers_are_padded_with_zeros_to_a_width() -> None:
    assert file_urls(NumberedFiles("http://a/{}.ds", start_index=9, n_left_pad_zeros=3, num_files=2)) == [
        "http://a/009.ds",
        "http://a/010.ds",
    ]
    assert file_urls(NumberedFiles("http://a/{}.ds", 1234, 3, 1)) == ["http://a/1234.ds"]
    assert file_urls(NumberedFiles("http://a/{}.ds", 5, 0, 1)) == ["http://a/5.ds"]


@pytest.mark.parametrize("template", ["http://a/x.ds", "http://a/{}/{}.ds"])
def test_a_template_has_one_place_for_the_number(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"url_template must have \{\} once"):
        file_urls(NumberedFiles(template, 0, 0, 1))


@pytest.mark.parametrize("count", [0, 2**32 - 1])
def test_a_number_of_files_that_cannot_be_meant_is_refused(count: int) -> None:
    with pytest.raises(ConfigurationError, match="num_files must lie between 1 and 65536"):
        file_urls(NumberedFiles("http://a/{}.ds", 0, 0, count))


def test_buckets_are_read_by_plain_https() -> None:
    assert plain_url("gs://bucket/a b/c.bin") == "https://storage.googleapis.com/bucket/a%20b/c.bin"


@pytest.mark.parametrize(
    "url",
    ["", "a.bin", "/etc/passwd", "file:///etc/passwd", "ftp://a/b", "http://", "http://a/b c", "http://a/b\r\nHost: c",
     "http://a:99999/", "http://[::1/", "gs:///x"],
)  # fmt: skip
def test_only_the_web_is_asked(url: str) -> None:
    with pytest.raises(ConfigurationError, match="only http://, https:// and gs:// URLs can"):
        file_urls(SingleUrl(url))


@pytest.mark.slow
@given(st.text(max_size=60))
def test_arbitrary_text_is_a_url_or_a_clear_error(text: str) -> None:
    for url in (text, "http://" + text, "https://a/" + text, "gs://" + text):
        try:
            plain = plain_url(url)
        except ConfigurationError:
            continue
        assert plain.startswith(("http://", "https://"))
        assert plain.isascii()
        assert not set(plain) & set(" \r\n\t")
        shown(plain)


# -- Psyche's own test: two files of 16 bytes, three tokens a sequence ---------------------------------------------


@pytest.mark.parametrize(
    ("shuffle", "order"), [(None, [0, 1, 2, 3]), (Seeded(b"\x2a" * 32), [3, 1, 2, 0])], ids=["plain", "shuffled"]
)
def test_two_files_of_sixteen_bytes_have_two_sequences_each(shuffle: Seeded | None, order: list[int]) -> None:
    with WebServer({"/000.ds": bytes(range(16)), "/001.ds": bytes(range(16, 32))}) as server:
        location = NumberedFiles(server.url + "/{}.ds", 0, 3, 2)
        settings: dict[str, Any] = {} if shuffle is None else {"shuffle": shuffle}
        with HttpTokens.open(location, TokenSize.TWO_BYTES, 3, **settings) as tokens:
            samples = [sample.input_ids.tolist() for sample in tokens.get_samples(BatchId(0, 3))]
    plain = [[0x0100, 0x0302, 0x0504], [0x0706, 0x0908, 0x0B0A], [0x1110, 0x1312, 0x1514], [0x1716, 0x1918, 0x1B1A]]
    assert samples == [plain[place] for place in order]


# -- buckets -------------------------------------------------------------------------------------------------------


def item(server: WebServer, name: str, size: int) -> dict[str, str]:
    return {"name": name, "size": str(size), "mediaLink": f"{server.url}/media/{name}?generation=1&alt=media"}


def test_a_bucket_is_listed_page_by_page_and_sorted_by_url(client: WebClient) -> None:
    with WebServer({}) as server:
        pages = {
            "None": {
                "items": [item(server, "d/b.ds", 18), item(server, "d/readme.txt", 5), item(server, "d/c.npy", 20)],
                "nextPageToken": "more",
            },
            "more": {"items": [item(server, "d/a.bin", 34), item(server, "d/ds", 9)]},
        }

        def listing(handler: Handler) -> None:
            assert "prefix=d%2F" in handler.path
            page = "more" if "pageToken=more" in handler.path else "None"
            handler.reply(200, json.dumps(pages[page]).encode())

        server.tricks["GET"] = [listing, listing]
        files = find_web_files(Gcp("bucket", "d/"), client, gcs_endpoint=server.url)
        assert [(file.url.partition("?")[0].rpartition("/")[2], file.size) for file in files] == [
            ("a.bin", 34),
            ("b.ds", 18),
            ("c.npy", 20),
        ]
        tokens = np.arange(17, dtype="<u2")
        server.files["/media/d/a.bin"] = tokens.tobytes()
        with HttpTokens(files, TokenSize.TWO_BYTES, 4) as provider:
            assert provider.get_samples(BatchId(1, 1))[0].input_ids.tolist() == [4, 5, 6, 7]


def test_a_bucket_without_a_prefix_is_listed_whole() -> None:
    assert listing_url("a/b", "", None) == (
        "https://storage.googleapis.com/storage/v1/b/a%2Fb/o?fields=items%28name%2Csize%2CmediaLink%29%2CnextPageToken"
    )


@pytest.mark.slow
def test_a_list_without_end_is_given_up(client: WebClient) -> None:
    with WebServer({}) as server:
        server.always["GET"] = lambda handler: handler.reply(200, b'{"nextPageToken": "again"}')
        with pytest.raises(InvalidDataError, match="does not end after 200 pages"):
            find_web_files(Gcp("bucket", ""), client, gcs_endpoint=server.url)


def test_an_empty_bucket_has_no_training_data(client: WebClient) -> None:
    with WebServer({}) as server:
        server.always["GET"] = lambda handler: handler.reply(200, b"{}")
        assert find_web_files(Gcp("bucket", ""), client, gcs_endpoint=server.url) == []
    with pytest.raises(ConfigurationError, match="none of the 0 training data files"):
        HttpTokens([], TokenSize.TWO_BYTES, 4)


@pytest.mark.parametrize(
    "page",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"items": 5}',
        b'{"items": [5]}',
        b'{"items": [{"name": "a.bin"}]}',
        b'{"items": [{"name": 5, "size": "1", "mediaLink": "http://a/"}]}',
        b'{"items": [{"name": "a.bin", "size": "-1", "mediaLink": "http://a/"}]}',
        b'{"items": [{"name": "a.bin", "size": "many", "mediaLink": "http://a/"}]}',
        b'{"items": [{"name": "a.bin", "size": "99999999999999999999", "mediaLink": "http://a/"}]}',
        b'{"items": [{"name": "a.bin", "size": "4", "mediaLink": "file:///etc/passwd"}]}',
        b'{"items": [], "nextPageToken": 5}',
    ],
)
def test_a_list_that_is_none_is_refused(page: bytes) -> None:
    with pytest.raises(InvalidDataError):
        read_listing(page)


@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_a_list_or_a_clear_error(data: bytes) -> None:
    try:
        read_listing(data)
    except InvalidDataError:
        pass


# -- what servers say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "bytes", "bytes */9", "bytes 1-2", "items 1-2/3", "bytes 1-2/3, 4-5/6", "b" * 999]
)
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidDataError, match="not a range of bytes"):
        read_content_range(text)


def test_a_range_may_leave_the_size_open() -> None:
    assert read_content_range("bytes 3-9/*").total is None
    assert read_content_range(" bytes 3-9/10 ").total == 10


@pytest.mark.parametrize("size", [-1, 2**50 + 1])
def test_no_file_has_such_a_size(size: int) -> None:
    with pytest.raises(InvalidDataError, match="which no file has"):
        WebFile("http://a/b?secret", size)
