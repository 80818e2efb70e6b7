"""Which coefficients are sent, and that several senders' are averaged over those who sent one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distro_optim.compress.topk import contributor_mean, contributor_weights, select_topk

ROWS, SIZE = 4, 12


def contributions(parts: int, k: int, absent: list[bool], seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Index, value and weight ``(rows, parts * k)``; within one contributor no position occurs twice in a row."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.cat([torch.rand(ROWS, SIZE, generator=generator).argsort(1)[:, :k] for _ in range(parts)], dim=1)
    value = torch.randn(ROWS, parts * k, generator=generator, dtype=torch.float64)
    if not any(absent[:parts]):
        return index, value, None
    here = torch.tensor([[0.0 if gone else 1.0] for gone in absent[:parts]], dtype=torch.float64)
    return index, value, here.expand(parts, k).reshape(1, -1).expand(ROWS, -1)


def plain_mean(index: Tensor, value: Tensor, weight: Tensor | None, parts: int) -> Tensor:
    """torch's own mean, given only those who are there."""
    k = index.shape[1] // parts
    here = [p for p in range(parts) if weight is None or float(weight[0, p * k])]
    columns = [c for p in here for c in range(p * k, (p + 1) * k)]
    zeros = torch.zeros(ROWS, SIZE, dtype=torch.float64)
    return zeros.scatter_reduce(1, index[:, columns], value[:, columns], reduce="mean", include_self=False)


def buffers() -> tuple[Tensor, Tensor]:
    return torch.full((ROWS, SIZE), torch.nan, dtype=torch.float64), torch.full(
        (ROWS, SIZE), torch.nan, dtype=torch.float64
    )


cases = st.tuples(
    st.integers(1, 16), st.integers(1, SIZE), st.lists(st.booleans(), min_size=16, max_size=16), st.integers(0, 1 << 32)
)


@pytest.mark.slow
@given(cases)
@settings(deadline=None)
def test_the_mean_is_over_those_who_sent_a_coefficient(case: tuple[int, int, list[bool], int]) -> None:
    parts, k, absent, seed = case
    index, value, weight = contributions(parts, k, absent, seed)
    out, scratch = buffers()
    mean = contributor_mean(index, value, weight, out=out, scratch=scratch, parts=parts)
    torch.testing.assert_close(mean, plain_mean(index, value, weight, parts), rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@given(cases)
@settings(deadline=None)
def test_shares_add_up_to_the_mean(case: tuple[int, int, list[bool], int]) -> None:
    parts, k, absent, seed = case
    index, value, weight = contributions(parts, k, absent, seed)
    scratch, scratch2 = buffers()
    share = contributor_weights(index, value, weight, scratch=scratch, scratch2=scratch2, parts=parts)
    summed = torch.zeros(ROWS, SIZE, dtype=torch.float64).scatter_add(1, index, share)
    torch.testing.assert_close(summed, plain_mean(index, value, weight, parts), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("parts", [2, 3, 5, 7, 16])
def test_the_mean_of_signs_does_not_depend_on_the_order_of_peers(parts: int) -> None:
    generator = torch.Generator().manual_seed(parts)
    index, value, _ = contributions(parts, 6, [False] * parts, 9)
    value = value.sign().float()
    order = torch.randperm(parts, generator=generator)
    shuffled = [torch.cat([x.chunk(parts, 1)[p] for p in order.tolist()], dim=1) for x in (index, value)]
    means = []
    for i, v in ((index, value), (shuffled[0], shuffled[1])):
        out, scratch = (b.float() for b in buffers())
        means.append(contributor_mean(i, v, None, out=out, scratch=scratch, parts=parts))
    assert torch.equal(means[0], means[1])


@given(k=st.integers(1, SIZE), seed=st.integers(0, 1 << 32))
@settings(deadline=None)
def test_the_largest_magnitudes_are_chosen_with_their_signs(k: int, seed: int) -> None:
    coefficients = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed))
    index, value = select_topk(coefficients, k, scratch=torch.empty_like(coefficients))
    assert index.shape == value.shape == (ROWS, k)
    assert torch.equal(value, coefficients.gather(1, index))
    expected = coefficients.abs().sort(1, descending=True).values[:, :k]
    assert torch.equal(value.abs().sort(1, descending=True).values, expected)


@pytest.mark.parametrize("k", [1, 8, 32, 64, 500, 4096])
@pytest.mark.parametrize("size", [64, 1000, 1024, 4096, 64 * 67, 4099])
@pytest.mark.parametrize("ties", [False, True])
def test_tiles_of_all_sizes_searched_in_one_round_or_two_give_the_same_choice(ties: bool, size: int, k: int) -> None:
    k = min(k, size)
    coefficients = torch.randn(3, size, generator=torch.Generator().manual_seed(size + k))
    if ties:
        coefficients = (2 * coefficients).round()  # few magnitudes, each of them often, and many zeros
    index, value = select_topk(coefficients, k, scratch=torch.empty_like(coefficients))
    assert all(len(set(row)) == k for row in index.tolist())
    assert torch.equal(value, coefficients.gather(1, index))
    expected = coefficients.abs().sort(1, descending=True).values[:, :k]
    assert torch.equal(value.abs().sort(1, descending=True).values, expected)


@pytest.mark.parametrize("size", [64, 4096])
def test_rows_of_equals_and_of_nan_leave_the_others_their_choice(size: int) -> None:
    coefficients = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
    coefficients[1] = 0
    coefficients[3] = torch.nan
    index, _ = select_topk(coefficients, 8, scratch=torch.empty_like(coefficients))
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < size for row in index.tolist())
    for row in (0, 2, 4):
        expected = coefficients[row].abs().sort(descending=True).indices[:8]
        assert set(index[row].tolist()) == set(expected.tolist())
