"""A model is saved in the layout of Hugging Face, whole or not at all, and comes back bit for bit, also without us."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import warm_python
from distro_optim.errors import ConfigurationError, ModelConfigError, ModelWeightsError
from distro_optim.models import saving
from distro_optim.models.accumulation import train_batch
from distro_optim.models.causal_lm import CausalLM
from language_models.small import DEEPSEEK, EXPERTS, LLAMA, sentences

KINDS = [
    pytest.param("HfLlama", LLAMA, id="Llama"),
    pytest.param("HfDeepseek", DEEPSEEK, id="DeepSeek"),
    pytest.param("HfDeepseek", {**DEEPSEEK, "q_lora_rank": None}, id="DeepSeek with plain queries"),
    pytest.param("HfAuto", EXPERTS, id="DeepSeek with experts"),
]
SHARD = 33_000  # bytes: several parts
TIMEOUT = 150  # seconds, of which loading transformers on a busy machine takes most


def same(one: CausalLM, other: CausalLM) -> bool:
    a, b = one.tensors(), other.tensors()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [saving.MAX_SHARD_BYTES, SHARD], ids=["one file", "parts"])
@pytest.mark.parametrize(("architecture", "config"), KINDS)
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path: Path, architecture: str, config: dict[str, Any], shard: int
) -> None:
    model = CausalLM(config, architecture, seed=4)
    train_batch(model, sentences(2))
    model.make_optimizer(lr=1e-3).step()
    model.save_pretrained(tmp_path / "model", max_shard_bytes=shard)
    loaded = CausalLM.from_folder(tmp_path / "model", architecture, seed=9)
    assert same(model, loaded)
    assert loaded.config.values == model.config.values
    assert torch.equal(model(sentences(2)).loss, loaded(sentences(2)).loss)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_parts_are_filled_in_the_order_of_names_and_listed_in_an_index(tmp_path: Path) -> None:
    model = CausalLM(LLAMA, "HfLlama")
    model.save_pretrained(tmp_path, max_shard_bytes=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.tensors().values())
    listed = sorted(index["weight_map"].items(), key=lambda item: item[0].encode())
    assert [file for _, file in listed] == sorted(file for _, file in listed)
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as part:
            assert part.metadata() == {"format": "pt"}
            assert set(part.keys()) == {name for name, home in listed if home == file}
        assert (tmp_path / file).stat().st_size < SHARD + 4000


WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("distro_optim", "lightning", "iroh"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import huggingface_hub, torch
huggingface_hub.constants.HF_HUB_OFFLINE = True
from transformers import AutoModelForCausalLM
tokens = torch.tensor([list(range(24))])
for folder in sys.argv[1:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.bfloat16)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    print("loss", model(tokens, labels=tokens).loss.float().item())
assert not any(name.startswith("distro_optim") for name in sys.modules)
"""


@pytest.mark.slow
def test_transformers_loads_it_where_this_package_is_not_there(tmp_path: Path) -> None:
    losses, folders = [], []
    for number, (architecture, config, shard) in enumerate(
        [
            ("HfLlama", LLAMA, SHARD),
            ("HfDeepseek", DEEPSEEK, SHARD),
            ("HfDeepseek", {**DEEPSEEK, "q_lora_rank": None}, saving.MAX_SHARD_BYTES),
            ("HfAuto", EXPERTS, SHARD),
            ("HfAuto", {**LLAMA, "tie_word_embeddings": True}, SHARD),
        ]
    ):
        model = CausalLM(config, architecture, seed=2)
        model.save_pretrained(tmp_path / str(number), max_shard_bytes=shard)
        folders.append(str(tmp_path / str(number)))
        losses.append(model(torch.arange(24)[None]).loss.item())
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = warm_python.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_US, *folders],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        without_this_package=True,
    )
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")]
    assert found == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_a_folder_that_transformers_wrote_is_read(tmp_path: Path) -> None:
    model = CausalLM(LLAMA, "HfLlama", seed=6)
    model._network.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    assert same(CausalLM.from_folder(tmp_path / "theirs", "HfLlama"), model)


def test_weights_in_float32_become_those_of_the_model(tmp_path: Path) -> None:
    exact = CausalLM(LLAMA, "HfLlama", dtype=torch.float32)
    exact.save_pretrained(tmp_path)
    loaded = CausalLM.from_folder(tmp_path, "HfLlama")
    assert all(torch.equal(t.bfloat16(), loaded.tensors()[name]) for name, t in exact.tensors().items())


@pytest.mark.slow
def test_a_file_without_the_output_of_tied_embeddings_gives_both(tmp_path: Path) -> None:
    model = CausalLM({**LLAMA, "tie_word_embeddings": True}, "HfAuto")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    loaded = CausalLM.from_folder(tmp_path, "HfAuto").tensors()
    assert torch.equal(loaded["lm_head.weight"], loaded["model.embed_tokens.weight"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelWeightsError, match=r"lack lm_head\.weight"):
        CausalLM.from_folder(tmp_path, "HfAuto")


@pytest.mark.slow
def test_the_tokenizer_goes_where_the_model_goes(tmp_path: Path) -> None:
    CausalLM(LLAMA, "HfLlama").save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "first" / "notes.txt").write_text("not part of the model")
    CausalLM.from_folder(tmp_path / "first", "HfLlama").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert sorted(p.name for p in (tmp_path / "second").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.slow
def test_what_was_there_is_replaced_whole(tmp_path: Path) -> None:
    CausalLM(LLAMA, "HfLlama", seed=1).save_pretrained(tmp_path / "model", max_shard_bytes=SHARD)
    new = CausalLM(LLAMA, "HfLlama", seed=2)
    new.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    assert same(CausalLM.from_folder(tmp_path / "model", "HfLlama"), new)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["save_file", "_sync", "_swap"])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    old = CausalLM(LLAMA, "HfLlama", seed=1)
    old.save_pretrained(tmp_path / "model")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, broken, fail)
    with pytest.raises(ModelWeightsError, match=r"cannot be saved in .*No space left on device.*make room"):
        CausalLM(LLAMA, "HfLlama", seed=2).save_pretrained(tmp_path / "model")
    assert same(CausalLM.from_folder(tmp_path / "model", "HfLlama"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_in_place_of_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ModelWeightsError, match="is a file"):
        CausalLM(LLAMA, "HfLlama").save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_part_too_small_for_a_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give at least as much"):
        CausalLM(LLAMA, "HfLlama").save_pretrained(tmp_path / "model", max_shard_bytes=100)
    assert not (tmp_path / "model").exists()


# ---------------------------------------------------------------------------------------- folders that are not right


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CausalLM(LLAMA, "HfLlama").save_pretrained(tmp_path / "model", max_shard_bytes=SHARD)
    return tmp_path / "model"


def edit(folder: Path, file: str, change: dict[str, torch.Tensor | None]) -> None:
    """Puts, replaces or (None) removes tensors of a file."""
    tensors = load_file(folder / file)
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / file, metadata={"format": "pt"})


def single(folder: Path) -> Path:
    CausalLM(LLAMA, "HfLlama").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, "they lack model.norm.weight"),
        ({"model.norm.weight": torch.ones(32)}, r"model.norm.weight has shape \(32,\), by config.json \(64,\)"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "model.norm.weight is stored as I8"),
    ],
)
def test_other_weights_are_refused_with_the_first_difference(
    folder: Path, change: dict[str, torch.Tensor | None], words: str
) -> None:
    edit(single(folder), "model.safetensors", change)
    with pytest.raises(ModelWeightsError, match=words):
        CausalLM.from_folder(folder, "HfLlama")


@pytest.mark.slow
def test_what_old_files_have_beside_the_weights_is_left_out(folder: Path) -> None:
    edit(single(folder), "model.safetensors", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    CausalLM.from_folder(folder, "HfLlama")


def test_a_missing_part_is_named(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(ModelWeightsError, match=r"model-00002-of-.* is not there: download the folder again"):
        CausalLM.from_folder(folder, "HfLlama")


@pytest.mark.parametrize("keep", [0, 4, 100, -10])
def test_a_file_that_is_cut_is_damaged(folder: Path, keep: int) -> None:
    path = next(folder.glob("model-00001-*"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelWeightsError, match="is damaged"):
        CausalLM.from_folder(folder, "HfLlama")


@pytest.mark.slow
@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": 5}',
        '{"weight_map": {"lm_head.weight": "../secret.safetensors"}}',
        '{"weight_map": {"lm_head.weight": "/etc/passwd"}}',
        '{"weight_map": {"lm_head.weight": "model.bin"}}',
        '{"weight_map": {"lm_head.weight": 3}}',
    ],
)
def test_an_index_that_is_no_index_or_leads_elsewhere_is_damaged(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelWeightsError, match="is damaged"):
        CausalLM.from_folder(folder, "HfLlama")


def test_an_index_that_names_what_no_file_has_is_told(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.more"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ModelWeightsError, match=r"lists model\.layers\.9\.more, which the files do not have"):
        CausalLM.from_folder(folder, "HfLlama")


def test_pickles_are_not_read(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelWeightsError, match=r"pytorch_model\.bin is a pickle, which is not read: convert it"):
        CausalLM.from_folder(folder, "HfLlama")


def test_an_empty_folder_has_no_config_and_one_with_a_config_alone_no_weights(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelConfigError, match=r"config\.json is not there"):
        CausalLM.from_folder(tmp_path / "empty", "HfLlama")
    shutil.copy(folder / "config.json", tmp_path / "empty")
    with pytest.raises(ModelWeightsError, match="no safetensors in"):
        CausalLM.from_folder(tmp_path / "empty", "HfLlama")


def test_experts_of_transformers_4_are_told_from_a_wrong_model(tmp_path: Path) -> None:
    model = CausalLM(EXPERTS, "HfAuto")
    if not any(name.endswith("experts.gate_up_proj") for name in model.tensors()):
        pytest.skip("this version of transformers has the experts apart")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    joint = tensors.pop("model.layers.1.mlp.experts.gate_up_proj")
    tensors |= {f"model.layers.1.mlp.experts.{n}.gate_proj.weight": part.contiguous() for n, part in enumerate(joint)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelWeightsError, match="install transformers<5 for this model"):
        CausalLM.from_folder(tmp_path, "HfAuto")
