"""Which files on the web a run's data are, and what web servers say of them. No I/O.

PsycheFoundation/psyche, ``shared/data-provider/src/http.rs``: one URL, numbered files, or the token files under a
prefix of a public bucket of Google Cloud Storage, sorted by the URL under which each can be fetched.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from ...coordinator.model import NumberedFiles, SingleUrl
from ...errors import ConfigurationError, InvalidDataError
from ..token_files import EXTENSIONS

__all__ = [
    "GCS_ENDPOINT",
    "MAX_FILES",
    "ContentRange",
    "Listing",
    "WebFile",
    "file_urls",
    "listing_url",
    "plain_url",
    "read_content_range",
    "read_listing",
    "shown",
]

GCS_ENDPOINT: Final = "https://storage.googleapis.com"

MAX_FILES: Final = 1 << 16
"""Files of one data set; chosen so that asking for the sizes of all takes minutes, not hours."""

MAX_FILE_BYTES: Final = 1 << 50
"""Above any file there is; a larger size is a lie, and would overflow what is computed from it."""


@dataclass(frozen=True)
class WebFile:
    """A file and its size in bytes."""

    url: str
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_FILE_BYTES:
            raise InvalidDataError(f"{shown(self.url)} is said to have {self.size} bytes, which no file has")


def plain_url(url: str) -> str:
    """An ``http`` or ``https`` URL; ``gs://bucket/name`` becomes the ``https`` URL under which it can be fetched.

    Raises:
        ConfigurationError: it is none of the three.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme == "gs" and parts.netloc:
        return f"{GCS_ENDPOINT}/{quote(parts.netloc)}{quote(parts.path)}"
    # Control characters and spaces could end a line of the request early.
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigurationError(
            f"training data cannot be fetched from {url!r}: only http://, https:// and gs:// URLs can", name="url"
        )
    return quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def shown(url: str) -> str:
    """The URL as it may stand in a message: without what could be a password or a signature."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else "")


def file_urls(location: SingleUrl | NumberedFiles) -> list[str]:
    """The URLs of a location in order. (A bucket has to be asked for its files.)

    Raises:
        ConfigurationError: the location makes no sense.
    """
    if isinstance(location, SingleUrl):
        return [plain_url(location.url)]
    template, count = location.url_template, location.num_files
    if template.count("{}") != 1:
        raise ConfigurationError(
            f"url_template must have {{}} once, where the number goes, got {template!r}", name="url_template"
        )
    if not 1 <= count <= MAX_FILES:
        raise ConfigurationError(f"num_files must lie between 1 and {MAX_FILES}, got {count}", name="num_files")
    numbers = range(location.start_index, location.start_index + count)
    return [plain_url(template.replace("{}", str(number).zfill(location.n_left_pad_zeros))) for number in numbers]


# -- buckets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """One page of a bucket's list: its token files, and the name of the next page if there is one."""

    files: tuple[WebFile, ...]
    next_page: str | None


def listing_url(bucket: str, prefix: str, page: str | None, *, endpoint: str = GCS_ENDPOINT) -> str:
    """Where a page of the list of a public bucket is (Google Cloud Storage JSON API, ``Objects: list``)."""
    wanted = {"fields": "items(name,size,mediaLink),nextPageToken"}
    if prefix:
        wanted["prefix"] = prefix
    if page is not None:
        wanted["pageToken"] = page
    return f"{endpoint}/storage/v1/b/{quote(bucket, safe='')}/o?{urlencode(wanted)}"


def read_listing(data: bytes) -> Listing:
    """Reads a page.

    Raises:
        InvalidDataError: it is none.
    """
    try:
        page = json.loads(data)
        items: list[dict[str, Any]] = page.get("items", [])
        files = [
            WebFile(plain_url(item["mediaLink"]), int(item["size"]))
            for item in items
            if "." + item["name"].rpartition(".")[2] in EXTENSIONS
        ]
        following = page.get("nextPageToken")
        if following is not None and not isinstance(following, str):
            raise TypeError("nextPageToken is not a string")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidDataError(f"no list of a bucket's files came: {type(error).__name__}: {error}") from None
    return Listing(tuple(files), following)


# -- ranges ------------------------------------------------------------------------------------------------------------

_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True)
class ContentRange:
    """Which bytes an answer holds, the last one included, and of how many; None if it does not say."""

    first: int
    last: int
    total: int | None


def read_content_range(text: str) -> ContentRange:
    """Reads the header ``Content-Range`` (RFC 9110, section 14.4).

    Raises:
        InvalidDataError: it is none.
    """
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        raise InvalidDataError(f"the answer names its bytes as {text[:100]!r}, which is not a range of bytes")
    return ContentRange(int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3]))
