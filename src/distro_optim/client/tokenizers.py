"""How many tokens a ``tokenizer.json`` knows, as Hugging Face writes it; the library ``tokenizers`` is not needed."""

from __future__ import annotations

import json
from typing import Any, Final

__all__ = ["TOKENIZER_FILE", "tokens_of"]

TOKENIZER_FILE: Final = "tokenizer.json"


def tokens_of(text: bytes) -> int | None:
    """One more than the largest number of a token; None if the text does not say.

    Args:
        text: of the file. It may come from a peer.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers: list[Any] = []
    if isinstance(vocabulary, dict):
        numbers += vocabulary.values()
    elif isinstance(vocabulary, list):  # a unigram model numbers its tokens by their place
        numbers.append(len(vocabulary) - 1)
    added = content.get("added_tokens")
    numbers += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    known = [number for number in numbers if type(number) is int and number >= 0]
    return max(known) + 1 if known else None
