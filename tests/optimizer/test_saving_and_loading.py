"""A saved and reloaded optimizer continues bit for bit: whatever the mode, the style, and the order of loading."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from distro_optim import DisTrO, MemoryExchange
from distro_optim.errors import ConfigurationError, DistroError
from optimizer.models import STEPS, EveryShape, all_same_bits, copies, plain_step, same_bits, set_gradients

OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlap"])
QUANTIZE = pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
STYLE = pytest.mark.parametrize("style", STEPS)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(style: str, steps: int = 5, *, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, DisTrO]:
    model = EveryShape(dtype)
    optimizer = DisTrO(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    for step in range(steps):
        STEPS[style](model, optimizer, step)
    return model, optimizer


def assert_they_go_on_alike(a: tuple[Any, DisTrO], b: tuple[Any, DisTrO], style: str, first: int = 5) -> None:
    for step in range(first, first + 5):
        for model, optimizer in (a, b):
            STEPS[style](model, optimizer, step)
        assert all_same_bits(copies(a[0].parameters()), copies(b[0].parameters())), step
    states = [optimizer.state_dict()["state"] for _, optimizer in (a, b)]
    for number, entry in states[0].items():
        for key, value in entry.items():
            if key == "weight" and style == "closure":
                continue  # stale while the lookahead is off
            assert same_bits(value, states[1][number][key]), (number, key)


@pytest.mark.slow
@OVERLAP
@QUANTIZE
@STYLE
@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("into", ["fresh", "trained"])
def test_it_continues_bit_for_bit(overlap: bool, quantize: bool, style: str, order: str, mode: str, into: str) -> None:
    run = trained(style, overlap=overlap, quantize_1bit=quantize)
    if mode == "eval":
        run[1].eval()
    saved_model, saved_optimizer = through_a_file([run[0].state_dict(), run[1].state_dict()])
    # Into one of other weights, which looks ahead itself if it was trained in the plain style.
    other = trained("plain", 0 if into == "fresh" else 4, overlap=overlap, quantize_1bit=quantize)
    with torch.no_grad():
        other[0].head.weight.add_(1.0)
    if order == "model first":
        other[0].load_state_dict(saved_model)
        other[1].load_state_dict(saved_optimizer)
    else:
        other[1].load_state_dict(saved_optimizer)
        other[0].load_state_dict(saved_model)
    if mode == "eval":
        with pytest.raises(DistroError, match="evaluation mode"):
            other[1].step()
        run[1].train()
        other[1].train()
    assert_they_go_on_alike(run, other, style)


@pytest.mark.slow
@STYLE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_momentum_keeps_its_precision_in_a_checkpoint(style: str, dtype: torch.dtype) -> None:
    """The base class casts state to the dtype of the parameter."""
    run = trained(style, dtype=dtype, quantize_1bit=False)
    other = trained(style, 0, dtype=dtype, quantize_1bit=False)
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(through_a_file(run[1].state_dict()))
    assert_they_go_on_alike(run, other, style)


@pytest.mark.slow
def test_true_weights_are_in_the_optimizers_state_even_if_the_models_was_never_saved() -> None:
    run, other = trained("plain"), trained("plain", 0)
    with torch.no_grad():
        other[0].head.weight.add_(1.0)
    other[1].load_state_dict(run[1].state_dict())
    assert_they_go_on_alike(run, other, "plain")


@pytest.mark.slow
def test_a_checkpoint_much_like_the_weights_that_look_ahead_is_loaded_whole() -> None:
    """In bfloat16 a checkpoint of a few steps ago has most elements in common with what is there."""
    run = trained("closure", dtype=torch.bfloat16)
    other = trained("plain", dtype=torch.bfloat16)
    loaded = other[0].head.weight.detach().clone()
    loaded[0] += 1.0
    with torch.no_grad():
        other[0].head.weight.copy_(loaded)
    other[1].load_state_dict(run[1].state_dict())
    assert same_bits(other[0].head.weight, loaded)


@OVERLAP
@STYLE
def test_a_loaded_state_shares_no_memory_with_the_saved_one(overlap: bool, style: str) -> None:
    run, other = trained(style, overlap=overlap), trained(style, 0, overlap=overlap)
    state = run[1].state_dict()
    other[1].load_state_dict(state)
    theirs = {t.untyped_storage().data_ptr() for entry in state["state"].values() for t in entry.values() if t.numel()}
    for entry in other[1].state.values():
        for key, tensor in entry.items():
            if tensor.numel():
                assert tensor.untyped_storage().data_ptr() not in theirs, key
    before = copy.deepcopy(state)
    STEPS[style](*other, 5)
    for number, entry in state["state"].items():
        for key, tensor in entry.items():
            assert same_bits(tensor, before["state"][number][key]), key


@pytest.mark.slow
@STYLE
@OVERLAP
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_bit_for_bit_and_apart(style: str, overlap: bool, how: str) -> None:
    run = trained(style, overlap=overlap)
    twin = copy.deepcopy(run) if how == "deepcopy" else pickle.loads(pickle.dumps(run))  # noqa: S301
    assert {id(p) for p in twin[0].parameters()} == {id(p) for g in twin[1].param_groups for p in g["params"]}
    assert_they_go_on_alike(run, twin, style)


def test_a_copy_does_not_take_part_in_the_exchange_of_the_original() -> None:
    [exchange, elsewhere] = MemoryExchange.group(1) + MemoryExchange.group(1)
    param = nn.Parameter(torch.ones(4))
    optimizer = DisTrO([param], exchange=exchange)
    set_gradients([param], 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert twin.exchange is None
    with pytest.raises(DistroError, match=r"set optimizer\.exchange"):
        twin.step()
    twin.exchange = elsewhere
    twin.step()
    with pytest.raises(ConfigurationError, match="exchange='gloo'"):
        twin.exchange = "gloo"  # type: ignore[assignment]


def test_a_state_with_momentum_alone_loads_as_from_plain_demo() -> None:
    run, other = trained("plain", overlap=False), trained("plain", 0)
    state = run[1].state_dict()
    demo = {
        "state": {number: {"delta": entry["delta"]} for number, entry in state["state"].items()},
        "param_groups": [{"lr": 0.25, "params": state["param_groups"][0]["params"]}],
    }
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(demo)
    assert other[1].param_groups[0]["lr"] == 0.25
    assert other[1].param_groups[0]["compression_topk"] == 8
    for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert same_bits(run[1].state[a]["delta"], other[1].state[b]["delta"])
    plain_step(*other, 5)


@pytest.mark.parametrize("saved_overlap", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@STYLE
def test_a_state_loads_across_overlap_settings(saved_overlap: bool, mode: str, style: str) -> None:
    run, other = trained(style, overlap=saved_overlap), trained(style, 0, overlap=not saved_overlap)
    if mode == "eval":
        run[1].eval()
    state = run[1].state_dict()
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(state)
    run[1].eval()
    other[1].eval()
    assert all_same_bits(copies(run[0].parameters()), copies(other[0].parameters()))
    other[1].train()
    for step in range(3):
        STEPS[style](*other, step)
    through_a_file(other[1].state_dict())


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_state_of_another_optimizer_starts_with_fresh_momentum(kind: Any) -> None:
    model = EveryShape()
    other = kind(model.parameters(), lr=0.5, weight_decay=0.25)
    model.loss(0).backward()
    other.step()
    optimizer = DisTrO(model.parameters())
    with pytest.warns(
        UserWarning, match=r"another optimizer's, .* starts from zero, with the lr=0\.5, weight_decay=0\.25"
    ):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert "exp_avg" not in optimizer.state[model.scale]
    assert not optimizer.state[model.scale]["delta"].any()
    plain_step(model, optimizer, 0)


@pytest.mark.slow
@STYLE
@pytest.mark.parametrize("wrong", ["shape", "groups", "length", "in flight"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(style: str, wrong: str) -> None:
    run, spared = trained(style), trained(style)
    state = copy.deepcopy(run[1].state_dict())
    if wrong == "shape":
        state["state"][2]["delta"] = torch.zeros(3, 3)
        message = r"delta of parameter 2 has shape \(3, 3\), expected"
    elif wrong == "groups":
        state["param_groups"].append({"params": []})
        message = "different number of parameter groups"
    elif wrong == "in flight":
        state["state"][2]["in_flight_index"] = torch.zeros(1, 3, 3, dtype=torch.int32)
        message = r"update of parameter 2 has shape \(3, 3\), expected"
    else:
        state["param_groups"][0]["params"].pop()
        message = "doesn't match the size"
    with pytest.raises(ValueError, match=message):
        run[1].load_state_dict(state)
    assert_they_go_on_alike(run, spared, style)


@pytest.mark.slow
def test_loaded_compression_settings_win_as_other_hyper_parameters_do() -> None:
    run = trained("plain", compression_topk=3, compression_chunk=16)
    other = trained("plain", 0)
    other[0].load_state_dict(run[0].state_dict())
    other[1].load_state_dict(run[1].state_dict())
    assert other[1].param_groups[0]["compression_topk"] == 3
    assert_they_go_on_alike(run, other, "plain")


@pytest.mark.slow
def test_a_load_hook_of_the_user_is_heard() -> None:
    run, other = trained("plain"), trained("plain", 0)

    def double(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries = {n: {**entry, "delta": 2 * entry["delta"]} for n, entry in state["state"].items()}
        return {**state, "state": entries}

    other[1].register_load_state_dict_pre_hook(double)
    other[1].load_state_dict(run[1].state_dict())
    for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(2 * run[1].state[a]["delta"], other[1].state[b]["delta"])


@pytest.mark.slow
def test_a_scheduler_and_its_optimizer_continue_together() -> None:
    def make() -> tuple[EveryShape, DisTrO, torch.optim.lr_scheduler.LRScheduler]:
        model = EveryShape()
        optimizer = DisTrO(model.parameters(), lr=0.01)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    runs = [make(), make()]
    for step in range(4):
        plain_step(*runs[0][:2], step)
        runs[0][2].step()
    parts: list[tuple[Any, Any]] = list(zip(runs[1], runs[0], strict=True))
    for ours, theirs in parts:
        ours.load_state_dict(through_a_file(theirs.state_dict()))
    for step in range(4, 8):
        for model, optimizer, scheduler in runs:
            plain_step(model, optimizer, step)
            scheduler.step()
        assert all_same_bits(copies(runs[0][0].parameters()), copies(runs[1][0].parameters()))


@pytest.mark.slow
def test_what_peers_have_in_flight_is_saved_by_each_of_them() -> None:
    def make() -> list[tuple[EveryShape, DisTrO]]:
        models = [EveryShape() for _ in range(3)]
        exchanges = MemoryExchange.group(3)
        return [(m, DisTrO(m.parameters(), lr=0.01, exchange=e)) for m, e in zip(models, exchanges, strict=True)]

    def go(peers: list[tuple[EveryShape, DisTrO]], steps: range) -> None:
        for step in steps:
            for peer, (model, optimizer) in enumerate(peers):
                optimizer.zero_grad()
                model.loss(10 * step + peer).backward()
                optimizer.begin_step()
            for _, optimizer in peers:
                optimizer.finish_step()

    run, resumed = make(), make()
    go(run, range(4))
    for (model, optimizer), (saved_model, saved) in zip(resumed, run, strict=True):
        model.load_state_dict(through_a_file(saved_model.state_dict()))
        optimizer.load_state_dict(through_a_file(saved.state_dict()))
    go(run, range(4, 8))
    go(resumed, range(4, 8))
    for (a, _), (b, _) in zip(run, resumed, strict=True):
        assert all_same_bits(copies(a.parameters()), copies(b.parameters()))
        assert all_same_bits(copies(a.parameters()), copies(run[0][0].parameters()))


@pytest.mark.slow
def test_everything_in_a_state_is_a_tensor_or_a_plain_value() -> None:
    _, optimizer = trained("plain")
    state = optimizer.state_dict()
    assert all(isinstance(v, torch.Tensor) for entry in state["state"].values() for v in entry.values())
    for group in state["param_groups"]:
        assert {type(value) for value in group.values()} <= {float, int, bool, list, str}


@pytest.mark.slow
def test_saving_half_way_through_a_step_is_refused_because_an_update_would_be_lost() -> None:
    model, optimizer = trained("plain")
    optimizer.begin_step()
    with pytest.raises(DistroError, match="finish the step first"):
        optimizer.state_dict()
    with pytest.raises(DistroError, match="finish the step first"):
        optimizer.begin_step()
    optimizer.finish_step()
    with pytest.raises(DistroError, match="without begin_step"):
        optimizer.finish_step()
    optimizer.state_dict()
    plain_step(model, optimizer, 0)
