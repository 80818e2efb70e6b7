"""The transform of a tile: orthonormal, the same as torch_dct's, and the same sparsely as densely."""

from __future__ import annotations

import pytest
import torch
import torch_dct

from distro_optim.compress.dct import TRANSFORMS, Transform, dct_basis, make_transform

CPU = torch.device("cpu")
SIDES = [(1, 1), (1, 2), (1, 64), (3, 5), (64, 64), (7, 1), (64, 29)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}  # torch_dct's own float64 goes through float32 constants


def make(name: str, h: int, w: int, dtype: torch.dtype = torch.float64, n: int = 6) -> tuple[Transform, torch.Tensor]:
    generator = torch.Generator().manual_seed(h * 100 + w)
    return make_transform(name, h, w, dtype, CPU), torch.randn(n, h, w, generator=generator, dtype=dtype)


def encoded(transform: Transform, tiles: torch.Tensor) -> torch.Tensor:
    return transform.encode(tiles, out=torch.empty_like(tiles), scratch=torch.empty_like(tiles))


def decoded(transform: Transform, coefficients: torch.Tensor) -> torch.Tensor:
    return transform.decode(coefficients, out=torch.empty_like(coefficients), scratch=torch.empty_like(coefficients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 29, 64, 101])
def test_a_basis_is_orthonormal(size: int, dtype: torch.dtype) -> None:
    basis = dct_basis(size, dtype, CPU)
    assert basis.dtype == dtype
    eye = torch.eye(size, dtype=dtype)
    torch.testing.assert_close(basis @ basis.T, eye, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)


def test_the_basis_of_four_points_has_the_known_first_row() -> None:
    expected = torch.tensor([0.5, 0.6533, 0.5, 0.2706], dtype=torch.float64)
    torch.testing.assert_close(dct_basis(4, torch.float64, CPU)[0], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("h", "w"), SIDES)
def test_encoding_is_the_two_dimensional_dct(h: int, w: int, dtype: torch.dtype) -> None:
    transform, tiles = make("dct", h, w, dtype)
    expected = torch_dct.dct_2d(tiles, norm="ortho")
    torch.testing.assert_close(encoded(transform, tiles), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("h", "w"), SIDES)
def test_decoding_undoes_encoding_and_keeps_the_norm(h: int, w: int, name: str) -> None:
    transform, tiles = make(name, h, w)
    coefficients = encoded(transform, tiles)
    torch.testing.assert_close(decoded(transform, coefficients), tiles)
    torch.testing.assert_close(coefficients.norm(), tiles.norm())


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (-1.0, 1.0), (-0.5, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize(("h", "w"), SIDES)
def test_adding_a_few_coefficients_is_decoding_them_and_adding(
    h: int, w: int, alpha: float, beta: float, name: str
) -> None:
    transform, tiles = make(name, h, w)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(h * w, (len(tiles), 5), generator=generator)  # some occur twice
    value = torch.randn(len(tiles), 5, generator=generator, dtype=torch.float64)
    dense = torch.zeros(len(tiles), h * w, dtype=torch.float64).scatter_add_(1, index, value).view_as(tiles)
    expected = beta * tiles + alpha * decoded(transform, dense)
    transform.add_sparse(tiles, index, value, alpha=alpha, beta=beta)
    torch.testing.assert_close(tiles, expected)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_not_to_be_read_may_be_anything(name: str) -> None:
    transform, tiles = make(name, 4, 4)
    tiles.fill_(torch.nan)
    transform.add_sparse(tiles, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1).double(), alpha=1.0, beta=0.0)
    assert bool(tiles.isfinite().all())


def test_the_identity_leaves_tiles_as_they_are() -> None:
    transform, tiles = make("identity", 4, 6)
    assert torch.equal(encoded(transform, tiles), tiles)
    assert torch.equal(decoded(transform, tiles), tiles)
