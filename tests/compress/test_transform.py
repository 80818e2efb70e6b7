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
    return transform.encode([tiles], out=torch.empty_like(tiles), scratch=torch.empty_like(tiles))


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
@pytest.mark.parametrize(("h", "w"), SIDES)
def test_a_few_coefficients_are_decoded_alike_sparsely(h: int, w: int, name: str) -> None:
    transform, tiles = make(name, h, w)
    generator = torch.Generator().manual_seed(3)
    index = torch.randint(h * w, (len(tiles), 5), generator=generator)  # some occur twice
    value = torch.randn(len(tiles), 5, generator=generator, dtype=torch.float64)
    dense = torch.zeros(len(tiles), h * w, dtype=torch.float64).scatter_add_(1, index, value).view_as(tiles)
    expected = decoded(transform, dense)
    out = tiles.fill_(torch.nan)  # which is not read
    assert transform.decode_sparse(index, value, out=out) is out
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("h", "w"), [(64, 64), (43, 64), (64, 16), (65, 64), (64, 65), (3, 100)])
def test_small_and_large_tiles_are_transformed_alike(h: int, w: int, dtype: torch.dtype) -> None:
    """Which of the two libraries multiplies depends on the size."""
    transform, tiles = make("dct", h, w, dtype)
    left, right = dct_basis(h, dtype, CPU), dct_basis(w, dtype, CPU)
    torch.testing.assert_close(encoded(transform, tiles), left.T @ tiles @ right)
    torch.testing.assert_close(decoded(transform, tiles), left @ tiles @ right.T)


@pytest.mark.parametrize(("h", "w"), [(4, 8), (64, 64), (7, 3)])
def test_tiles_may_lie_in_their_tensors(h: int, w: int) -> None:
    """Of two tensors, in which the rows of a tile are far apart."""
    transform, _ = make("dct", h, w)
    assert transform.takes_views
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(rows * h, 3 * w, generator=generator, dtype=torch.float64) for rows in (2, 1)]
    views = [t.view(-1, h, 3, w).transpose(1, 2) for t in tensors]
    copied = torch.cat([view.reshape(-1, h, w) for view in views])
    out = torch.empty_like(copied)
    transform.encode(views, out=out, scratch=torch.empty_like(copied))
    assert torch.equal(out, encoded(transform, copied))


def test_the_identity_leaves_tiles_as_they_are() -> None:
    transform, tiles = make("identity", 4, 6)
    assert torch.equal(encoded(transform, tiles), tiles)
    assert torch.equal(decoded(transform, tiles), tiles)
