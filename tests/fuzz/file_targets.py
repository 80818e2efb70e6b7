"""Targets that read files: keys, data, tokenizers, weights and checkpoints, as a stranger may have written them.

A folder in memory, if the system has one, takes the file of each try. Each target raises what its reader says it
raises, put into one class by :func:`refused_with`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

__all__ = ["FILE_INSTRUMENTED", "FILE_TARGETS", "file_seeds", "refused_with"]

FILE_INSTRUMENTED: Final = (
    "client.tokenizers",
    "comm.iroh.keys",
    "coordinator.solana.wallet",
    "data.making.vocabulary",
    "data.parquet",
    "models.weights",
    "strategy.model.checkpoint",
)

MEMORY: Final = Path("/dev/shm")
"""Files there are never written to a disk; Linux has it."""

STEP: Final = "step-00000120"
CHECKPOINT_FILES: Final = (
    "distro_optim.json",
    "model.safetensors",
    "momentum.safetensors",
    "run.toml",
    "model.safetensors.index.json",
)
"""Of a checkpoint; the first byte of an input says which of them the rest is. The last is there only in that case."""


@contextlib.contextmanager
def refused_with(*errors: type[Exception]) -> Iterator[None]:
    """What this decoder refuses with, as the others do."""
    from distro_optim.errors import ProtocolError

    try:
        yield
    except errors as error:
        raise ProtocolError(str(error)) from None


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)


def scratch(name: str) -> Path:
    """A folder of this process, the same in each try."""
    folder = Path(_kept().name, name)
    folder.mkdir(exist_ok=True)
    return folder


def _private(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def wallet_file(data: bytes) -> None:
    from distro_optim.coordinator.solana.wallet import derive_peer_secret, read_wallet
    from distro_optim.errors import ConfigurationError

    with refused_with(ConfigurationError):
        keys = read_wallet(_private(scratch("keys") / "wallet.json", data))
        assert len(derive_peer_secret("run", keys)) == 32


def key_file(data: bytes) -> None:
    from distro_optim.comm.iroh.keys import load_secret_key
    from distro_optim.errors import ConfigurationError

    path = _private(scratch("keys") / "identity", data)
    with refused_with(ConfigurationError):
        assert len(load_secret_key(path).public) == 32
    assert path.read_bytes() == data


def parquet(data: bytes) -> None:
    from distro_optim.coordinator.types import BatchId
    from distro_optim.data.parquet import ParquetTokens
    from distro_optim.errors import ConfigurationError, DataError

    folder = scratch("train")
    (folder / "train.parquet").write_bytes(data)
    with (
        refused_with(ConfigurationError, DataError),
        contextlib.closing(ParquetTokens(folder, 4, vocab_size=9)) as rows,
    ):
        last = rows.num_sequences - 1
        for index in {0, last // 2, last}:
            rows.get_samples(BatchId(index, index))


def tokenizer_file(data: bytes) -> None:
    from distro_optim.client.tokenizers import tokens_of
    from distro_optim.data.making.vocabulary import load_tokenizer
    from distro_optim.errors import ConfigurationError, InvalidDataError

    known = tokens_of(data)
    assert known is None or known > 0
    path = scratch("tokenizer") / "tokenizer.json"
    path.write_bytes(data)
    with refused_with(ConfigurationError, InvalidDataError):
        tokenizer = load_tokenizer(path)
        for tokens in tokenizer.encode([b"hello \xff w\xc3\xb6rld", b""]):
            assert tokens.dtype == "uint32"


def model_folder(data: bytes) -> None:
    """The index of a model's files if the first byte is odd, else one of them."""
    import torch

    from distro_optim.errors import ModelWeightsError
    from distro_optim.models.weights import INDEX_FILE, SINGLE_FILE, FolderTensors, copy_weights

    is_index, data = data[:1] != b"" and data[0] % 2 == 1, data[1:]
    folder = scratch("model")
    (folder / SINGLE_FILE).write_bytes(_tensors() if is_index else data)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    if is_index:
        (folder / INDEX_FILE).write_bytes(data)
    with refused_with(ModelWeightsError):
        source = FolderTensors(folder)
        for name in source.names():
            shape, _ = source.describe(name)
            assert tuple(source.read(name).shape) == shape
        copy_weights({"weight": torch.zeros(2, 3)}, source)


def checkpoint(data: bytes) -> None:
    from distro_optim.errors import ConfigurationError, ProtocolError
    from distro_optim.strategy.model.checkpoint import CheckpointStore
    from distro_optim.strategy.model.named_tensors import NamedTensors

    name, data = CHECKPOINT_FILES[data[0] % len(CHECKPOINT_FILES) if data else 0], data[1:]
    folder = scratch("checkpoints") / STEP
    folder.mkdir(exist_ok=True)
    (folder / CHECKPOINT_FILES[-1]).unlink(missing_ok=True)
    for file, content in {**_checkpoint(), name: data}.items():
        (folder / file).write_bytes(content)
    with refused_with(ConfigurationError, ProtocolError):
        saved = CheckpointStore(folder.parent).latest()
        assert saved is not None
        model = _model()
        values = saved.weights(model, NamedTensors(dict(model.named_parameters()), {}, {}))
        assert values.keys() == {"weight"}
        saved.momentum()


@functools.cache
def _model() -> Any:
    import torch

    model = torch.nn.Linear(3, 2, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model


@functools.cache
def _tensors() -> bytes:
    """A file of safetensors."""
    import torch
    from safetensors.torch import save

    return save({"weight": torch.ones(2, 3), "count": torch.tensor(5)}, metadata={"format": "pt"})


@functools.cache
def _checkpoint() -> dict[str, bytes]:
    """The files of a valid one, by name."""
    from distro_optim.coordinator.formats.text import to_toml
    from distro_optim.strategy.model.identity import ModelIdentity, TensorIdentity
    from distro_optim.testing.coordinator import dummy_run

    weight = TensorIdentity("weight", "trained", "float32", (2, 3))
    identity = ModelIdentity(1, 120, bytes(32), (weight,), {"tiling": "padded"}, ({"lr": 0.1},), {"size": 5})
    about = {"run_id": "run", "model": json.loads(identity.encode())}
    content = json.dumps(about).encode(), _tensors(), _tensors(), to_toml(dummy_run()).encode()
    return dict(zip(CHECKPOINT_FILES, content, strict=False))


FILE_TARGETS: Final = {
    "wallet-file": wallet_file,
    "key-file": key_file,
    "parquet": parquet,
    "tokenizer-file": tokenizer_file,
    "model-folder": model_folder,
    "checkpoint": checkpoint,
}


def file_seeds() -> dict[str, list[bytes]]:
    """Inputs to begin with; at least one of each is valid."""
    from distro_optim.coordinator.solana.wallet import new_wallet

    keys = new_wallet()
    index = json.dumps({"weight_map": {"weight": "model.safetensors", "count": "model.safetensors"}}).encode()
    files = [*_checkpoint().values(), index]
    return {
        "wallet-file": [json.dumps(list(bytes(keys))).encode(), str(keys).encode()],
        "key-file": [bytes(range(32)), b"0f" * 32, b"0F" * 32 + b"\r\n"],
        "parquet": list(_parquet_files()),
        "tokenizer-file": list(_tokenizers()),
        "model-folder": [b"\0" + _tensors(), b"\0" + _tensors_of_all_types(), b"\1" + index],
        "checkpoint": [bytes([number]) + content for number, content in enumerate(files)],
    }


def _tensors_of_all_types() -> bytes:
    import torch
    from safetensors.torch import save

    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn)
    return save({"weight": torch.ones(2, 3), **{str(kind): torch.ones(2, dtype=kind) for kind in kinds}})


def _parquet_files() -> Iterator[bytes]:
    import pyarrow
    from pyarrow import parquet as writer

    for compression, dictionary in (("NONE", False), ("snappy", True), ("zstd", True)):
        rows = [[1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1]]
        columns = {"inputs": rows, "labels": [[-100, 2, 3, 4]] * 3, "sequence_lengths": [[4], [2, 2], [1, 3]]}
        table = pyarrow.table(
            {name: pyarrow.array(lists, pyarrow.list_(pyarrow.int32())) for name, lists in columns.items()}
        )
        buffer = io.BytesIO()
        writer.write_table(table, buffer, compression=compression, use_dictionary=dictionary, row_group_size=2)
        yield buffer.getvalue()


def _tokenizers() -> Iterator[bytes]:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {text: number for number, text in enumerate(["<unk>", "</s>", "h", "e", "l", "o", "he", "ll"])}
    made = [
        Tokenizer(models.BPE(vocabulary, [("h", "e"), ("l", "l")], unk_token="<unk>")),
        Tokenizer(models.WordLevel(vocabulary, "<unk>")),
        Tokenizer(models.Unigram([("<unk>", 0.0), ("h", -1.0), ("el", -2.0)], 0, False)),
        Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>")),
    ]
    made[0].pre_tokenizer = pre_tokenizers.ByteLevel()
    made[0].decoder = decoders.ByteLevel()
    made[1].pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made[2].normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "_")])
    made[3].post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    made[3].add_special_tokens(["</s>"])
    for tokenizer in made:
        yield tokenizer.to_str().encode()
