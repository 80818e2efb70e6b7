"""Raw token files behind web servers, read in ranges of bytes.

PsycheFoundation/psyche, ``shared/data-provider/src/http.rs``; :mod:`.sequences` has the order, :mod:`.web_files` the
files, :mod:`.client` the timeouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from typing_extensions import override

from ...coordinator.model import DontShuffle, Gcp, HttpTrainingDataLocation, Shuffle, TokenSize
from ...coordinator.types import BatchId
from ...errors import ConfigurationError, InvalidDataError
from ..provider import TokenProvider, TokenSequence
from ..sequences import TOKEN_TYPES, ByteRun, SequenceTable, decode_tokens
from .client import WebClient
from .files import GCS_ENDPOINT, MAX_FILES, WebFile, file_urls, listing_url, read_listing, shown

__all__ = ["HttpTokens", "find_web_files"]

REQUESTS_AT_ONCE: Final = 8
"""To the servers of one data set; chosen to hide a round trip of 100 ms without being a burden."""

MAX_RANGE_BYTES: Final = 4 * 1024 * 1024
"""Of one request, so that a cut connection costs little."""

MAX_LISTING_BYTES: Final = 16 * 1024 * 1024
"""Of one page of a bucket's list; a thousand files have about 500 kB."""

MAX_PAGES: Final = 200
"""Of a bucket's list; a page has up to a thousand names."""


class HttpTokens(TokenProvider):
    """The sequences of token files behind web servers. Their sizes are asked for at once, their bytes when needed.

    Args:
        files: URLs with their sizes, as :func:`find_web_files` gives them.
        token_size: width of a token.
        seq_len: tokens of a sequence.
        shuffle: the order.
        vocab_size: tokens the model knows; None leaves that unchecked.
        client: asks the servers; closed with the provider.

    Raises:
        ConfigurationError: there is no sequence.
        InvalidDataError: a file is cut.
    """

    def __init__(
        self,
        files: Sequence[WebFile],
        token_size: TokenSize,
        seq_len: int,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
        *,
        vocab_size: int | None = None,
        client: WebClient | None = None,
    ) -> None:
        super().__init__(seq_len, vocab_size=vocab_size)
        width = TOKEN_TYPES[token_size].itemsize
        for file in files:
            if file.size % width:
                raise InvalidDataError(
                    f"{shown(file.url)} is cut, or its tokens are not of {width} bytes: its {file.size} bytes are "
                    "not a whole number of them"
                )
        self._files = list(files)
        self._token_size = token_size
        self._table = SequenceTable([file.size for file in files], seq_len, token_size, shuffle, spare_tokens=1)
        if not len(self._table):
            raise ConfigurationError(
                f"none of the {len(files)} training data files on the web has a sequence of {seq_len} tokens and one "
                "to spare",
                name="location",
            )
        self._client = client or WebClient()
        self._threads = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="token ranges")

    @classmethod
    def open(
        cls,
        location: HttpTrainingDataLocation,
        token_size: TokenSize,
        seq_len: int,
        shuffle: Shuffle = DontShuffle(),  # noqa: B008 - immutable
        *,
        vocab_size: int | None = None,
        client: WebClient | None = None,
    ) -> HttpTokens:
        """Finds the files of a location, asks for their sizes, and opens them.

        Raises:
            ConfigurationError: the location makes no sense, or has no sequence.
            DataUnavailableError: the servers do not tell.
            InvalidDataError: what they tell is wrong.
        """
        client = client or WebClient()
        try:
            files = find_web_files(location, client)
            return cls(files, token_size, seq_len, shuffle, vocab_size=vocab_size, client=client)
        except BaseException:
            client.close()
            raise

    @property
    @override
    def num_sequences(self) -> int:
        return len(self._table)

    @override
    def close(self) -> None:
        super().close()
        self._client.close()
        self._threads.shutdown(cancel_futures=True)

    @override
    def _read(self, batch: BatchId) -> Sequence[TokenSequence]:
        most = max(1, MAX_RANGE_BYTES // self._table.sequence_bytes)
        runs = self._table.runs(batch, most=most)
        return [sample for samples in self._threads.map(self._fetch, runs) for sample in samples]

    def _fetch(self, run: ByteRun) -> list[TokenSequence]:
        file = self._files[run.file]
        raw = self._client.read(file.url, run.offset, run.sequences * self._table.sequence_bytes, file.size)
        tokens = decode_tokens(raw, self._token_size)
        return [TokenSequence(one) for one in tokens.reshape(run.sequences, self.seq_len)]


def find_web_files(
    location: HttpTrainingDataLocation, client: WebClient, *, gcs_endpoint: str = GCS_ENDPOINT
) -> list[WebFile]:
    """The files of a location with their sizes, in the order of the run.

    Raises:
        ConfigurationError: the location makes no sense.
        DataUnavailableError: a server does not tell.
        InvalidDataError: what it tells is wrong.
    """
    if isinstance(location, Gcp):
        return _bucket_files(location, client, gcs_endpoint)
    urls = file_urls(location)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="file sizes") as threads:
        sizes = threads.map(client.size, urls)
        try:
            return [WebFile(url, size) for url, size in zip(urls, sizes, strict=True)]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _bucket_files(location: Gcp, client: WebClient, endpoint: str) -> list[WebFile]:
    """All pages of the list of a bucket; the files sorted by URL, as Psyche has them."""
    files: list[WebFile] = []
    page: str | None = None
    for _ in range(MAX_PAGES):
        url = listing_url(location.bucket_name, location.filter_directory, page, endpoint=endpoint)
        listing = read_listing(client.get(url, MAX_LISTING_BYTES))
        files += listing.files
        if len(files) > MAX_FILES:
            raise InvalidDataError(f"bucket {location.bucket_name} lists more than {MAX_FILES} token files")
        page = listing.next_page
        if page is None:
            return sorted(files, key=lambda file: file.url)
    raise InvalidDataError(f"the list of bucket {location.bucket_name} does not end after {MAX_PAGES} pages")
