"""The rules that can be chosen: Muon's direction in what is sent, and steps of a fixed size of what arrives."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from distro_optim import DisTrO, MemoryExchange
from distro_optim.compress.tiling import tile_grid
from distro_optim.errors import ConfigurationError
from distro_optim.optim.orthogonal import orthogonalize, take_direction
from distro_optim.optim.reference import ReferenceDisTrO, newton_schulz, orthogonal
from optimizer.models import STEPS, EveryShape, all_same_bits, copies, plain_step, same_bits
from optimizer.test_agrees_with_plain_twins import Meeting, trained

RECIPE: dict[str, Any] = {"direction": "orthogonal", "update": "rms"}
RULES = [
    {"direction": direction, "update": update}
    for direction, update in itertools.product(["momentum", "orthogonal"], ["sign", "rms"])
]
BY_DELTA = {**RECIPE, "ahead": "delta"}
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["in time", "overlap"])


def run(style: str, steps: int, **settings: Any) -> tuple[EveryShape, DisTrO]:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01, **{**RECIPE, **settings})
    for step in range(steps):
        STEPS[style](model, optimizer, step)
    return model, optimizer


# -- what the rules do -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rules", [*RULES[1:], BY_DELTA], ids=lambda r: " ".join(r.values()))
@pytest.mark.parametrize(
    ("peers", "quantize", "overlap", "closure"),
    [(1, False, False, True), (3, False, True, False), (1, True, True, True)],
)
def test_a_script_gets_the_weights_of_the_plain_twin(
    rules: dict[str, Any], peers: int, quantize: bool, overlap: bool, closure: bool
) -> None:
    settings: dict[str, Any] = {
        **rules,
        "compression_chunk": 8,
        "compression_topk": 1 if quantize else 8,  # so that no element is 0 but for rounding
        "weight_decay": 0.1,
        "quantize_1bit": quantize,
        "overlap": overlap,
    }
    exchanges, meeting = MemoryExchange.group(peers), Meeting(peers)

    def fast(peer: int) -> Tensor:
        exchange = exchanges[peer] if peers > 1 else None
        return trained(lambda params: DisTrO(params, exchange=exchange, arithmetic="float", **settings), peer, closure)

    def plain(peer: int) -> Tensor:
        exchange = meeting.exchange(peer) if peers > 1 else None
        return trained(lambda params: ReferenceDisTrO(params, exchange=exchange, **settings), peer, closure)

    with ThreadPoolExecutor(peers) as pool:
        ours, expected = list(pool.map(fast, range(peers))), list(pool.map(plain, range(peers)))
    # In the vector of 8 at the end, what was sent leaves rounding errors alone, by whose signs the weights look ahead,
    # and signs make coefficients of equal size.
    certain = slice(None, -8 if overlap else None)
    for weights in ours:
        torch.testing.assert_close(weights[certain], expected[0][certain], rtol=0, atol=1e-10)


def direction_of(shape: tuple[int, ...], tiling: Any = "padded", scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A gradient, and what it becomes."""
    grad = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    out = torch.empty_like(grad)
    matrix = take_direction(grad, torch.zeros_like(grad), out, momentum=0.5, scale=1, grid=tile_grid(shape, 64, tiling))
    orthogonalize([] if matrix is None else [matrix])
    return grad, out


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (33, 33)])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_a_matrix_gets_singular_values_near_1_and_elements_of_the_size_of_signs(
    shape: tuple[int, int], scale: float
) -> None:
    _, out = direction_of(shape, scale=scale)
    values = torch.linalg.svdvals(out) / max(shape) ** 0.5
    assert 0.3 < float(values.min()) <= float(values.max()) < 1.3
    assert 0.6 < float(out.square().mean().sqrt()) < 1.3


@pytest.mark.parametrize(("shape", "tiling"), [((8, 4, 3, 3), "padded"), ((5, 6, 7), "divisor"), ((6, 7), "padded")])
def test_tensors_are_the_matrices_of_their_tiling(shape: tuple[int, ...], tiling: Any) -> None:
    grad, out = direction_of(shape, tiling)
    torch.testing.assert_close(out, orthogonal(0.75 * grad, tiling), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", [(), (7,), (1, 9), (9, 1), (1, 3, 3)])
def test_what_is_no_matrix_has_the_sign(shape: tuple[int, ...]) -> None:
    grad, out = direction_of(shape)
    assert torch.equal(out, grad.sign())


def test_matrices_of_one_shape_are_done_together_as_each_alone() -> None:
    matrices = [torch.randn(n, 6, 10, dtype=torch.float64) for n in (1, 3, 1)]
    matrices[0].zero_()
    expected = [torch.stack([10**0.5 * newton_schulz(m) for m in matrix]) for matrix in matrices]
    orthogonalize(matrices)
    for ours, plain in zip(matrices, expected, strict=True):
        torch.testing.assert_close(ours, plain)
    assert not matrices[0].any()


@pytest.mark.parametrize("shape", [(20, 30), (20, 300), (300, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_matrix_of_any_size_has_a_direction_that_is_finite(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The momentum of a matrix that gets no gradient any more becomes smaller than any number, step by step."""
    matrix = torch.randn(1, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for power in range(0, -320, -2):
        ours = matrix * 10.0**power
        orthogonalize([ours])
        assert ours.isfinite().all()
        assert float(ours.square().mean().sqrt()) < 1.3
    assert float(ours.abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (64, 640), (640, 64), (2, 300)])
@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_long_matrices_have_the_direction_of_the_plain_iteration(
    shape: tuple[int, int], smallest: float, dtype: torch.dtype, error: float
) -> None:
    """Though it is computed by their squares, in which small singular values are smaller still."""
    generator = torch.Generator().manual_seed(1)
    short, long = min(shape), max(shape)
    left, right = (
        torch.linalg.qr(torch.randn(size, short, dtype=torch.float64, generator=generator))[0] for size in (short, long)
    )
    values = torch.logspace(0, math.log10(smallest), short, dtype=torch.float64)
    matrix = (left * values) @ right.T
    matrix = matrix if shape[0] <= shape[1] else matrix.T
    ours = torch.stack([matrix, -matrix]).to(dtype)
    orthogonalize([ours])
    plain = long**0.5 * newton_schulz(matrix)
    assert ours.is_contiguous()
    assert float((ours[0].double() - plain).norm() / plain.norm()) < error
    assert torch.equal(ours[0], -ours[1])


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("quantize", [False, True], ids=["values", "signs"])
def test_a_step_has_the_size_of_gain_times_learning_rate(arithmetic: Any, quantize: bool) -> None:
    param = nn.Parameter(torch.zeros(128, 64))
    settings: dict[str, Any] = {"overlap": False, "quantize_1bit": quantize, "arithmetic": arithmetic}
    optimizer = DisTrO([param], lr=0.01, gain=3, **RECIPE, **settings)
    param.grad = torch.randn(param.shape)
    optimizer.step()
    assert float(param.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=1e-3)


def test_by_signs_a_gain_is_a_larger_step() -> None:
    param = nn.Parameter(torch.zeros(4, 4))
    optimizer = DisTrO([param], lr=0.25, direction="momentum", update="sign", gain=2, overlap=False)
    param.grad = torch.randn(4, 4)
    optimizer.step()
    assert set(param.detach().abs().view(-1).tolist()) <= {0.0, 0.5}


def test_a_tensor_without_gradient_stays_and_lays_nothing_ahead() -> None:
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
    optimizer = DisTrO(params, lr=0.1, **RECIPE)
    for _ in range(3):
        params[0].grad = torch.randn(4, 4)
        optimizer.step()
    optimizer.flush()
    assert torch.equal(params[1].detach(), torch.ones(4, 4))


# -- which rule applies ------------------------------------------------------------------------------------------------


def test_defaults_go_with_the_rules() -> None:
    def shown(**rules: Any) -> tuple[float, float]:
        [group] = DisTrO([nn.Parameter(torch.ones(2, 2))], **rules).param_groups
        return group["compression_decay"], group["gain"]

    assert shown(direction="momentum", update="sign") == (0.999, 1.0)
    assert shown(**RECIPE) == (0.7, 2.0)
    assert shown(direction="orthogonal", update="sign", compression_decay=0.5, gain=3) == (0.5, 3.0)


def test_parameter_groups_choose_for_themselves() -> None:
    a, b = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    old = {"params": [b], "direction": "momentum", "update": "sign"}
    optimizer = DisTrO([{"params": [a]}, old], lr=0.01, overlap=False, **RECIPE)
    assert [group["compression_decay"] for group in optimizer.param_groups] == [0.7, 0.999]
    assert "momentum_buffer" in optimizer.state[a]
    assert "momentum_buffer" not in optimizer.state[b]
    alone = nn.Parameter(torch.zeros(64, 64))
    published = DisTrO([alone], lr=0.01, overlap=False, direction="momentum", update="sign")
    for param in (a, b, alone):
        param.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    optimizer.step()
    published.step()
    assert same_bits(b.detach(), alone.detach())
    assert len(set(a.detach().abs().view(-1).tolist())) > 2


def test_updates_of_other_rules_are_refused() -> None:
    def made(**rules: Any) -> DisTrO:
        return DisTrO([nn.Parameter(torch.ones(8, 8))], **rules)

    rules = [*RULES, {**RECIPE, "gain": 3}]
    layouts = {made(**rule).plan.layout for rule in rules}
    assert len(layouts) == len(rules)
    ours, theirs = made(**RECIPE), made(direction="momentum", update="sign")
    with pytest.raises(ConfigurationError, match="made for other parameters"):
        ours.apply([theirs.generate()])


@pytest.mark.parametrize(("name", "value"), [("update", "sign"), ("gain", 7.0)])
def test_a_rule_cannot_change_in_mid_run(name: str, value: Any) -> None:
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = DisTrO([param], **RECIPE)
    param.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ConfigurationError, match=f"{name}=.*set it back"):
        optimizer.step()


def test_psyches_arithmetic_knows_no_other_step() -> None:
    with pytest.raises(ConfigurationError, match="give update='sign'"):
        DisTrO([nn.Parameter(torch.ones(4, 4))], arithmetic="psyche", **RECIPE)


# -- as for any optimizer ----------------------------------------------------------------------------------------------


@OVERLAP
@pytest.mark.parametrize("ahead", ["direction", "delta"])
@pytest.mark.parametrize("style", STEPS)
def test_a_saved_state_goes_on_bit_for_bit(overlap: bool, ahead: str, style: str) -> None:
    first, second = (run(style, steps, overlap=overlap, ahead=ahead) for steps in (4, 0))
    weights, state = copy.deepcopy([first[0].state_dict(), first[1].state_dict()])
    second[0].load_state_dict(weights)
    second[1].load_state_dict(state)
    for step in range(4, 7):
        for each in (first, second):
            STEPS[style](*each, step)
    assert all_same_bits(copies(first[0].parameters()), copies(second[0].parameters()))


def test_a_copy_goes_on_bit_for_bit() -> None:
    model, optimizer = run("closure", 3)
    others = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))  # noqa: S301 (our own)
    for a_model, an_optimizer in ((model, optimizer), *others):
        STEPS["closure"](a_model, an_optimizer, 3)
        assert all_same_bits(copies(a_model.parameters()), copies(model.parameters()))


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.distributed")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_checkpoint_of_torch_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = run("closure", 3), run("closure", 0)
    state = get_optimizer_state_dict(*first)
    assert "momentum_buffer" in cast("dict[str, Any]", state["state"])["conv.weight"]
    dcp.save({"optimizer": state, "model": first[0].state_dict()}, checkpoint_id=tmp_path / "at")
    loaded: dict[str, Any] = {"optimizer": get_optimizer_state_dict(*second), "model": second[0].state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path / "at")
    second[0].load_state_dict(loaded["model"])
    set_optimizer_state_dict(*second, optim_state_dict=loaded["optimizer"])
    for name in ("delta", "momentum_buffer", "direction"):
        ours, theirs = (copies(o.state[p][name] for p in m.parameters()) for m, o in (first, second))
        assert all_same_bits(ours, theirs), name


def test_a_state_of_other_rules_is_refused() -> None:
    _, optimizer = run("plain", 2)
    _, published = run("plain", 2, direction="momentum", update="sign")
    with pytest.raises(ConfigurationError, match="made with direction='momentum'"):
        optimizer.load_state_dict(published.state_dict())
    state = published.state_dict()
    for group in state["param_groups"]:  # as versions wrote it that knew no others
        for name in ("direction", "update", "gain", "momentum"):
            del group[name]
    with pytest.raises(ConfigurationError, match="made with direction='momentum'"):
        optimizer.load_state_dict(state)
    published.load_state_dict(state)
    assert published.param_groups[0]["update"] == "sign"


def test_another_optimizers_state_starts_afresh_by_our_rules() -> None:
    model, optimizer = run("plain", 0)
    other = torch.optim.AdamW(model.parameters(), lr=0.5)
    with pytest.warns(UserWarning, match="another optimizer's"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["direction"] == "orthogonal"
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_eval_puts_the_true_weights_back_and_flush_applies_the_last_update() -> None:
    model, optimizer = run("plain", 3)
    true = copies(optimizer.state[p]["weight"] for p in model.parameters())
    assert not all_same_bits(copies(model.parameters()), true)
    optimizer.eval()
    assert all_same_bits(copies(model.parameters()), true)
    optimizer.train()
    assert not all_same_bits(copies(model.parameters()), true)
    optimizer.flush()
    assert not all_same_bits(copies(model.parameters()), true)
    assert not optimizer.param_groups[0]["in_flight"]


def test_weights_look_ahead_by_the_last_direction_at_its_learning_rate() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    optimizer = DisTrO([param], lr=0.5, **RECIPE)
    param.grad = torch.randn(4, 6)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    assert torch.equal(param.detach(), -0.5 * optimizer.state[param]["direction"])


def test_weights_look_ahead_by_all_that_has_not_arrived() -> None:
    param = nn.Parameter(torch.zeros(16, 16))
    optimizer = DisTrO([param], lr=0.5, compression_chunk=8, compression_topk=1, **BY_DELTA)
    for _ in range(3):
        param.grad = torch.randn(16, 16)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.eval()
    true = param.detach().clone()
    optimizer.train()
    assert torch.equal(param.detach(), true - optimizer.delta(param))
    assert float(optimizer.delta(param).square().mean().sqrt()) > 0.5
    assert "direction" not in optimizer.state[param]
    optimizer.remove_own()
    optimizer.lookahead(0.0)
    assert torch.equal(param.detach(), true - optimizer.delta(param))


@pytest.mark.parametrize(
    ("rules", "ahead"),
    [({"direction": "momentum"}, "delta"), ({"direction": "momentum"}, "direction"), (RECIPE, "sign"), (RECIPE, 1)],
)
def test_by_what_weights_look_ahead_goes_with_the_direction(rules: dict[str, Any], ahead: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"ahead={ahead!r}: with direction='{rules['direction']}', give"):
        DisTrO([nn.Parameter(torch.ones(4, 4))], ahead=ahead, **rules)


def test_groups_look_ahead_as_their_directions_do() -> None:
    a, b, c = (nn.Parameter(torch.ones(4, 4)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "direction": "momentum", "ahead": None}, {"params": [c], "ahead": None}]
    optimizer = DisTrO(groups, **BY_DELTA)
    assert [group["ahead"] for group in optimizer.param_groups] == ["delta", "sign", "direction"]
    assert ["direction" in optimizer.state[p] for p in (a, b, c)] == [False, False, True]


def test_another_direction_brings_its_lookahead() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = DisTrO([param], **BY_DELTA)
    optimizer.reconfigure(tiling="padded", quantize_1bit=True, direction="momentum", update="sign")
    assert optimizer.param_groups[0]["ahead"] == "sign"
    assert "momentum_buffer" not in optimizer.state[param]
    optimizer.reconfigure(tiling="padded", quantize_1bit=True, direction="orthogonal")
    assert optimizer.param_groups[0]["ahead"] == "direction"


@pytest.mark.parametrize("said", [True, False], ids=["said", "not said"])
def test_peers_that_look_ahead_differently_are_peers(said: bool) -> None:
    """What is sent has the same meaning, and a state that one has saved is good for the other."""
    one, other = run("plain", 3, **BY_DELTA), run("plain", 0)
    assert one[1].plan.layout == other[1].plan.layout
    state = one[1].state_dict()
    for group in state["param_groups"]:
        if not said:  # as versions wrote it that knew one lookahead
            del group["ahead"]
    other[0].load_state_dict(one[0].state_dict())
    other[1].load_state_dict(state)
    assert other[1].param_groups[0]["ahead"] == ("delta" if said else "direction")
    for step in range(3, 5):
        for each in (one, other):
            STEPS["plain"](*each, step)
    same = all_same_bits(*(copies(model.parameters()) for model in (one[0], other[0])))
    assert same == said


def test_a_gradient_that_is_not_finite_touches_neither_momentum_nor_lookahead() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    optimizer = DisTrO([param], lr=0.1, **RECIPE)
    param.grad = torch.randn(4, 6)
    optimizer.step()
    before = copies(optimizer.state[param][name] for name in ("momentum_buffer",))
    param.grad = torch.full((4, 6), torch.nan)
    optimizer.step()
    assert optimizer.quarantined == 1
    assert all_same_bits(before, copies([optimizer.state[param]["momentum_buffer"]]))
    assert not optimizer.state[param]["direction"].any()
    assert param.isfinite().all()


def test_scaled_gradients_that_the_scaler_leaves_to_us_give_the_same_weights() -> None:
    results = []
    for scale in (1.0, 1024.0):
        param = nn.Parameter(torch.zeros(4, 6))
        optimizer = DisTrO([param], lr=0.1, **RECIPE)
        for step in range(3):
            param.grad = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
            optimizer.step()
        results.append(copies([param])[0])
    assert same_bits(*results)


def test_reset_forgets_both_momenta() -> None:
    model, optimizer = run("plain", 3)
    optimizer.reset()
    names = ("delta", "momentum_buffer", "direction")
    assert not any(optimizer.state[p][name].any() for p in model.parameters() for name in names)


def test_what_was_not_sent_stays_and_is_no_longer_looked_ahead_to() -> None:
    param = nn.Parameter(torch.zeros(8, 8))
    optimizer = DisTrO([param], lr=0.1, **RECIPE)
    param.grad = torch.randn(8, 8)
    optimizer.generate()
    whole = optimizer.delta(param)
    optimizer.keep_own()
    assert not optimizer.state[param]["direction"].any()
    optimizer.lookahead()
    assert not param.any()
    optimizer.remove_own()
    assert same_bits(optimizer.delta(param), whole)


@pytest.mark.slow
def test_replicas_of_the_recipe_stay_equal_and_learn() -> None:
    exchanges = MemoryExchange.group(3)
    target = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    params = [nn.Parameter(torch.zeros(20, 30)) for _ in exchanges]
    optimizers = [DisTrO([p], lr=0.05, exchange=e, **RECIPE) for p, e in zip(params, exchanges, strict=True)]
    for step in range(60):
        for peer, (param, optimizer) in enumerate(zip(params, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 60)
            noise = torch.randn(20, 30, generator=torch.Generator().manual_seed(100 * step + peer))
            param.grad = param.detach() - target + 0.3 * noise
            optimizer.begin_step()
        for optimizer in optimizers:
            optimizer.finish_step()
            optimizer.lookahead()
    for optimizer in optimizers:
        optimizer.eval()
    assert all(same_bits(param.detach(), params[0].detach()) for param in params)
    left = (params[0].detach() - target).square().mean() / target.square().mean()
    assert float(left) < 0.25


def test_a_plain_loop_needs_nothing_else() -> None:
    model = EveryShape()
    optimizer = DisTrO(model.parameters(), lr=0.01, **RECIPE)
    before = model.loss(0).item()
    for _ in range(25):
        plain_step(model, optimizer, 0)
    optimizer.flush()
    assert model.loss(0).item() < 0.9 * before
