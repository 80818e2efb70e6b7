"""What a user calls another place of a run's data, such as the argument of ``--data-mirror``.

It has the same files as the run's own place, and is read in the run's order and with the run's width of tokens, so that
a data index means the same sequence. Only the names are looked at here, and whether files are there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ...comm.streams import split_address
from ...coordinator.model import (
    Gcp,
    HttpLLMTrainingDataLocation,
    HttpTrainingDataLocation,
    LLMTrainingDataLocation,
    LocalData,
    NumberedFiles,
    ServerData,
    Shuffle,
    SingleUrl,
    TokenSize,
    WeightedHttpData,
)
from ...errors import ConfigurationError
from ...words import shown
from ..token_files import find_token_files
from ..web.files import file_urls, plain_url
from ..web.files import shown as shown_url

__all__ = ["MAX_MIRRORS", "CopyOnDisk", "mirror_of", "name_of"]

MAX_MIRRORS: Final = 16
"""Beside the run's own place; each costs some threads and connections. Chosen arbitrarily."""

_SCHEMES: Final = ("http://", "https://", "gs://")


@dataclass(frozen=True)
class CopyOnDisk:
    """Files of this machine that are also behind a web server, and are counted as they are there."""

    files: tuple[Path, ...]
    token_size: TokenSize
    shuffle: Shuffle


def mirror_of(location: LLMTrainingDataLocation, place: str) -> LLMTrainingDataLocation | CopyOnDisk:
    """Where else a run's data are.

    Args:
        location: what the run says.
        place: a URL, ``host:port``, or a file or folder of this machine.

    Raises:
        ConfigurationError: such data cannot be at such a place; says where they can.
    """
    is_url = place.startswith(_SCHEMES)
    match location:
        case ServerData():
            if is_url:
                raise _misplaced(place, "are at a data server", "HOST:PORT of another one, or a data.toml")
            path = Path(place)
            if path.suffix != ".toml" and not path.exists():
                split_address(place)
                return ServerData(place)
            if not path.is_file() or path.suffix != ".toml":
                # Nothing else says in which order the server has them.
                raise _misplaced(place, "are at a data server", "HOST:PORT of another one, or a data.toml")
            return LocalData(place)
        case HttpLLMTrainingDataLocation(where, token_size, shuffle):
            if is_url:
                return replace(location, location=_on_the_web(where, place))
            return CopyOnDisk(_on_disk(where, place), token_size, shuffle)
        case WeightedHttpData():
            if not is_url:
                raise _misplaced(place, "are a mixture", "the URL of another list of its members")
            plain_url(place)
            return WeightedHttpData(place)
        case _:
            raise ConfigurationError(
                f"--data-mirror {shown(place)}: the run's data are on your own disk or made up, so that no other place "
                "is needed: leave it out",
                name="data_mirror",
                value=place,
            )


def name_of(location: LLMTrainingDataLocation | CopyOnDisk) -> str:
    """A place as people know it, without what may be a password."""
    match location:
        case CopyOnDisk(files, _, _):
            one = files[0]
            return shown(str(one if len(files) == 1 else one.parent), _MAX_NAME)
        case ServerData(address):
            return f"the data server {shown(address)}"
        case LocalData(path):
            return shown(path, _MAX_NAME)
        case WeightedHttpData(url):
            return shown(shown_url(url), _MAX_NAME)
        case HttpLLMTrainingDataLocation(Gcp(bucket, folder), _, _):
            return shown(f"gs://{bucket}/{folder}", _MAX_NAME)
        case HttpLLMTrainingDataLocation(SingleUrl(url) | NumberedFiles(url), _, _):
            return shown(shown_url(url), _MAX_NAME)
        case _:
            return type(location).__name__


_MAX_NAME: Final = 200
"""Characters of a place in a message; longer ones than those of a run are nobody's."""


def _on_the_web(where: HttpTrainingDataLocation, place: str) -> HttpTrainingDataLocation:
    match where:
        case Gcp():
            bucket, _, folder = place.removeprefix("gs://").partition("/")
            if not place.startswith("gs://") or not bucket:
                raise _misplaced(place, "are in a bucket", "gs://BUCKET/FOLDER, or a folder with its files")
            return Gcp(bucket, folder)
        case NumberedFiles():
            if place.count("{}") != 1:
                raise _misplaced(
                    place,
                    f"are {where.num_files} numbered files",
                    "a URL with {} where the number goes, or a folder with the files",
                )
            numbered = replace(where, url_template=place)
            file_urls(replace(numbered, num_files=1))
            return numbered
        case SingleUrl():
            plain_url(place)
            return SingleUrl(place)


def _on_disk(where: HttpTrainingDataLocation, place: str) -> tuple[Path, ...]:
    """The files of a location in its order, with the names that they have there."""
    path = Path(place)
    if isinstance(where, SingleUrl) and path.is_file():
        return (path,)
    if not path.is_dir():
        raise ConfigurationError(
            f"--data-mirror {shown(place)} is neither a URL (https://...) nor a "
            f"{'file or ' if isinstance(where, SingleUrl) else ''}folder of this machine with the run's data",
            name="data_mirror",
            value=place,
        )
    if isinstance(where, Gcp):
        return tuple(find_token_files(path))
    # Of what the run says, only the last part of the path counts: nothing beside the folder is looked at.
    names = [url.split("?", 1)[0].rsplit("/", 1)[-1] for url in file_urls(where)]
    files = tuple(path / name for name in names)
    missing = next((file for file in files if file.name in ("", "..") or not file.is_file()), None)
    if missing is not None:
        raise ConfigurationError(
            f"--data-mirror {shown(place)} has no file {shown(missing.name)}, which is one of the {len(files)} that "
            "the run's data are",
            name="data_mirror",
            value=place,
        )
    return files


def _misplaced(place: str, what: str, instead: str) -> ConfigurationError:
    return ConfigurationError(
        f"--data-mirror {shown(place)}: the run's data {what}, of which a mirror is {instead}",
        name="data_mirror",
        value=place,
    )
