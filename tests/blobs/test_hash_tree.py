"""Chaining values in lock-step are those of the plain algorithm, and of the native package."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from blobs.samples import sample
from distro_optim.comm.iroh.blobs import tree
from distro_optim.comm.iroh.blobs.outboard import build_outboard, merged_prefix_hash, outboard_len
from reference import plain_blake3 as plain

pytestmark = pytest.mark.waiting


# Around every multiple that matters: blocks, chunks, groups, odd numbers of groups.
EDGES = [0, 1, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 3072, 5000, 15360, 16383, 16384, 16385]
GROUPS = [g * 16384 + extra for g in (2, 3, 5, 6, 7) for extra in (-1, 0, 1)]


@pytest.mark.parametrize("size", [n for n in EDGES if n <= 5000])
@pytest.mark.parametrize("start", [0, 1, 17, 2**31])
def test_chunk_cvs_are_those_of_the_plain_algorithm(size: int, start: int) -> None:
    data = sample(size)
    chunks = [data[i : i + 1024] for i in range(0, size, 1024)] or [b""]
    assert tree.chunk_cvs(data, start).tobytes() == b"".join(
        plain.chunk_cv(chunk, start + i) for i, chunk in enumerate(chunks)
    )


@pytest.mark.parametrize("size", [1024, 5000, 16384])
@pytest.mark.parametrize("start", [0, 16])
def test_a_subtree_cv_is_that_of_the_plain_algorithm(size: int, start: int) -> None:
    assert tree.subtree_cv(sample(size), start) == plain.subtree_cv(sample(size), start)


def test_parents_in_company_are_those_of_one_alone() -> None:
    pairs = np.frombuffer(sample(64 * 5), np.uint8).reshape(5, 64)
    assert tree.parent_cvs(pairs).tobytes() == b"".join(tree.parent_cv(pair.tobytes()) for pair in pairs)
    assert tree.parent_cv(pairs[0].tobytes()) == plain.parent_cv(pairs[0, :32].tobytes(), pairs[0, 32:].tobytes())


@pytest.mark.parametrize("size", [*EDGES, *GROUPS, 2**20 + 1, 5 * 2**20 + 17])
def test_the_root_of_the_tree_is_the_native_hash(size: int) -> None:
    root, outboard = build_outboard(sample(size))
    assert root == blake3(sample(size)).digest()
    assert len(outboard) == outboard_len(size)


def test_the_plain_algorithm_is_blake3() -> None:
    for size in (0, 1, 1024, 1025, 5000, 20000):
        assert plain.blake3(sample(size)) == blake3(sample(size)).digest()


def test_group_cvs_are_those_recorded() -> None:
    data = sample(40000)
    assert build_outboard(data)[0].hex() == "ccd32b4544a24c50fbefb249e10a8fcedc26e2794c79eb8a44ad0631bf07f53f"
    assert [cv.tobytes().hex() for cv in tree.group_cvs(data)] == [
        "5384f9b342c6cb86badedcbe662b0e980476a8db17db3cc1f13b19329749ab1f",
        "406632eceb31aa6735f072ad0554f5963f4082b5139978455b44f67732cf949d",
        "083663d9bddc14d40cc2f3869e01c5bebde7632dfea165eda38af01d93d5045b",
    ]


@pytest.mark.parametrize("groups", [3, 5, 6, 7, 8, 13])
def test_the_hash_of_every_prefix_follows_from_the_outboard(groups: int) -> None:
    data = sample(groups * 16384 - 100)
    _, outboard = build_outboard(data)
    for prefix in range(2, groups):
        assert merged_prefix_hash(outboard, groups, prefix) == blake3(data[: prefix * 16384]).digest()
