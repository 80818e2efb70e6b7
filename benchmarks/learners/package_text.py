"""The sources of installed Python packages, in tokens of a byte-level BPE that is trained on them: some 30 million."""

from __future__ import annotations

import hashlib
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

__all__ = ["CONTEXT", "VOCABULARY", "PackageText"]

CONTEXT = 256
VOCABULARY = 4096
PACKAGES = ("torch", "transformers", "sympy", "scipy", "numpy", "networkx", "sklearn", "pyarrow", "lightning")
"""Besides the standard library. Which there are, and their versions, is up to ``constraints.txt``."""
HOLD_OUT_EVERY = 20
LARGEST_FILE = 500_000  # beyond are tables and generated code
TOKENIZER_EVERY = 10  # the tokenizer is trained on every so many of the training files
_CACHE = Path("out") / "convergence" / "text"


class PackageText:
    """Windows of tokens. What a worker gets depends on nothing but ``seed``, the step and its number.

    The tokens, ``uint16``, are kept under ``out/convergence/text`` and made again (in a minute or two) when a file of
    the packages has changed.
    """

    def __init__(self, *, seed: int) -> None:
        self._seed = seed
        self.training, self.held_out_tokens = _tokens()

    def batch(self, step: int, worker: int, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets for one worker's step, each ``(size, CONTEXT) int64``."""
        generator = np.random.default_rng((self._seed, step, worker))
        return _windows(self.training, generator.integers(0, len(self.training) - CONTEXT, size))

    def held_out(self, size: int) -> tuple[Tensor, Tensor]:
        """``size`` windows spread evenly over the held-out files: the same ones at every call."""
        starts = np.linspace(0, len(self.held_out_tokens) - CONTEXT - 1, size).astype(np.int64)
        return _windows(self.held_out_tokens, starts)


def _windows(tokens: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _files() -> list[Path]:
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in PACKAGES:
        found = find_spec(package)
        if found is not None and found.submodule_search_locations:
            roots.append(Path(found.submodule_search_locations[0]))
    files = []
    for root in roots:
        inside = (path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts)
        files += sorted(path for path in inside if path.stat().st_size <= LARGEST_FILE)
    return files


def _tokens() -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    files = _files()
    names = "\n".join(f"{path} {path.stat().st_size}" for path in files)
    cached = _CACHE / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}.npz"
    if not cached.exists():
        held_out = files[HOLD_OUT_EVERY // 2 :: HOLD_OUT_EVERY]
        training = sorted(set(files) - set(held_out))
        tokenizer = _trained([_read(path) for path in training[::TOKENIZER_EVERY]])
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part.npz")
        np.savez(part, training=_encoded(tokenizer, training), held_out=_encoded(tokenizer, held_out))
        part.replace(cached)
    with np.load(cached, allow_pickle=False) as arrays:
        return arrays["training"], arrays["held_out"]


def _trained(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _encoded(tokenizer: Tokenizer, files: list[Path]) -> npt.NDArray[np.uint16]:
    rows = [tokenizer.encode(_read(path)).ids for path in files]
    return np.concatenate([np.asarray(row, dtype=np.uint16) for row in rows])


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
