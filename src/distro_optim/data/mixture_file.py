"""The JSON file that lists the members of a weighted mixture. No I/O.

PsycheFoundation/psyche, ``shared/data-provider/src/weighted/http.rs``; an example is ``examples/mixture.json``::

    {"shuffle": "DontShuffle" | {"Seeded": [32 numbers]},
     "providers": [[location, weight], ...] | [location, ...]}

A location is what a run's ``data_location`` has under ``Http``. Without weights the members' lengths count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from ..coordinator.formats.text import from_plain
from ..coordinator.model import HttpLLMTrainingDataLocation, Shuffle
from ..errors import ConfigurationError, InvalidDataError, ProtocolError
from .mixture_index import normalized_weights

__all__ = ["MAX_FILE_BYTES", "MixtureFile", "read_mixture"]

MAX_FILE_BYTES: Final = 1024 * 1024
"""A member has about 300 bytes."""

MAX_MEMBERS: Final = 1024
"""Data sets of a mixture; each costs connections and threads."""


@dataclass(frozen=True)
class MixtureFile:
    """What the file says.

    Attributes:
        weights: as given, None where the lengths count.
    """

    shuffle: Shuffle
    members: tuple[HttpLLMTrainingDataLocation, ...]
    weights: tuple[float, ...] | None


def read_mixture(data: bytes | str) -> MixtureFile:
    """Reads the file.

    Raises:
        InvalidDataError: it is none; the message names the place.
    """
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(f"the list of a mixture is not JSON: {error}") from None
    try:
        if not isinstance(plain, dict) or not isinstance(plain.get("providers"), list):
            raise ProtocolError("it has no list 'providers'")
        shuffle: Shuffle = from_plain(Shuffle, plain.get("shuffle"))  # type: ignore[arg-type]
        providers: list[Any] = plain["providers"]
        if not 1 <= len(providers) <= MAX_MEMBERS:
            raise ProtocolError(f"it has {len(providers)} providers, between 1 and {MAX_MEMBERS} can be used")
        weighted = isinstance(providers[0], list)
        members, weights = [], []
        for number, entry in enumerate(providers):
            location = entry
            if weighted:
                location, weight = _pair(number, entry)
                weights.append(weight)
            try:
                members.append(from_plain(HttpLLMTrainingDataLocation, location))
            except ProtocolError as error:
                raise ProtocolError(f"provider {number}: {error}") from None
        if weighted:
            normalized_weights(weights)
    except (ProtocolError, ConfigurationError) as error:
        raise InvalidDataError(f"the list of a mixture is wrong: {error}") from None
    return MixtureFile(shuffle, tuple(members), tuple(weights) if weighted else None)


def _pair(number: int, entry: Any) -> tuple[Any, float]:
    if not isinstance(entry, list) or len(entry) != 2:
        raise ProtocolError(f"provider {number} is not a location and a weight, as the first one is")
    location, weight = entry
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ProtocolError(f"provider {number} has the weight {str(weight)[:40]!r}, which is not a number")
    try:
        return location, float(weight)
    except OverflowError:
        raise ProtocolError(f"provider {number} has a weight that is too large") from None
