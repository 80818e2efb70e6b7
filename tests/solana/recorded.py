"""Transactions that Psyche's real programs answered, and random walks of its coordinator's logic.

``vectors/solana/transactions``: one JSON object a line, with the instructions, the error if there was one, and the
accounts that were named as they were after it. ``vectors/solana``: calls of the coordinator's program.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

VECTORS = Path(__file__).parents[1] / "vectors" / "solana"
TRANSACTIONS = sorted((VECTORS / "transactions").glob("*.jsonl.gz"))
WALKS = sorted(VECTORS.glob("*.jsonl.gz"))


def lines_of(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def instruction_of(plain: dict[str, Any]) -> Instruction:
    metas = [AccountMeta(Pubkey.from_string(key), signs, writable) for key, signs, writable in plain["accounts"]]
    return Instruction(Pubkey.from_string(plain["program"]), base64.b64decode(plain["data"]), metas)


def instructions_of(line: dict[str, Any]) -> list[Instruction]:
    return [instruction_of(plain) for plain in line["instructions"]]
