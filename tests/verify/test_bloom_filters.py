"""Bloom filters: the reference's bits, no false negative, and many at once as one by one."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.errors import ConfigurationError
from distro_optim.verify.bloom import BLOOM_WORDS, BloomFilter, fnv1a
from distro_optim.verify.filter_bank import MAX_REMEMBERED, FilterBank

U64 = st.integers(0, 2**64 - 1)
HELLO = hashlib.sha256(b"Hello, world!").digest()


def positions(filter_: BloomFilter) -> set[int]:
    return {64 * w + b for w, word in enumerate(filter_.words) for b in range(64) if word >> b & 1}


def test_adding_sets_the_words_of_the_reference() -> None:
    bloom = BloomFilter(range(1, 9))
    bloom.add(HELLO)
    expected = [0] * BLOOM_WORDS
    expected[1], expected[2], expected[8] = 1152923703630102528, 16384, 67108864
    expected[12], expected[14], expected[15] = 9223372036854775816, 9007199254740992, 65536
    assert bloom.words == tuple(expected)


def test_the_default_filter_with_zero_keys_sets_one_bit() -> None:
    bloom = BloomFilter([0] * 8)
    assert b"\x05" * 32 not in bloom
    bloom.add(b"\x05" * 32)
    assert bloom.words == (0,) * 15 + (4294967296,)


def test_positions_of_a_hashed_public_key() -> None:
    key = bytes.fromhex("4cb5abf6ad79fbf5abbccafcc269d85cd2651ed4b885b5869f241aedf0a5ba29")
    bloom = BloomFilter(range(1, 9))
    item = hashlib.sha256(key).digest()
    assert [fnv1a(item, k) % 1024 for k in range(1, 9)] == [299, 500, 297, 626, 319, 456, 413, 998]
    bloom.add(item)
    assert positions(bloom) == {299, 500, 297, 626, 319, 456, 413, 998}


def test_small_filters_of_the_reference_tests() -> None:
    bloom = BloomFilter([1, 2], [0] * 8)
    bloom.add(bytes([1, 2, 3]))
    assert bytes([1, 2, 3]) in bloom
    assert bytes([4, 5, 6]) not in bloom
    bloom.clear()
    assert bytes([1, 2, 3]) not in bloom
    assert bloom.keys == (1, 2)

    bloom = BloomFilter([1, 2, 3])
    bloom.add_many([bytes([1, 2, 3]), bytes([4, 5, 6]), bytes([7, 8, 9])])
    assert bytes([1, 4, 7]) not in bloom


@pytest.mark.slow
@given(st.lists(U64, min_size=1, max_size=8), st.lists(st.binary(max_size=40), max_size=20), st.binary(max_size=40))
def test_the_fast_filter_agrees_with_the_plain_hash(keys: list[int], items: list[bytes], probe: bytes) -> None:
    bloom = BloomFilter(keys)
    bloom.add_many(items)
    plain = {fnv1a(item, key) % 1024 for item in items for key in keys}
    assert positions(bloom) == plain
    assert bloom.contains_many(items).all()
    assert (probe in bloom) == all(fnv1a(probe, key) % 1024 in plain for key in keys)


def test_ten_thousand_items_added_at_once_are_all_found() -> None:
    rng = random.Random(5)
    items = [rng.randbytes(32) for _ in range(10_000)]
    bloom = BloomFilter([rng.getrandbits(64) for _ in range(8)], [0] * 4096)
    bloom.add_many(items)
    assert bloom.contains_many(items).all()
    strangers = bloom.contains_many([rng.randbytes(32) for _ in range(10_000)])
    assert abs(strangers.mean() - bloom.false_positive_rate()) < 0.01
    assert bloom.false_positive_rate() < 0.01


@pytest.mark.slow
@given(st.data())
def test_asking_all_filters_agrees_with_asking_each(data: st.DataObject) -> None:
    items = data.draw(st.lists(st.binary(min_size=30, max_size=32), min_size=1, max_size=4))
    blooms = []
    for _ in range(data.draw(st.integers(0, 5))):
        bloom = BloomFilter(data.draw(st.lists(U64, min_size=8, max_size=8)))
        bloom.add_many(data.draw(st.lists(st.sampled_from([*items, b"another"]), max_size=3)))
        blooms.append(bloom)
    bank = FilterBank((b.keys, b.words) for b in blooms)
    expected = np.array([[item in bloom for item in items] for bloom in blooms], dtype=bool).reshape(-1, len(items))
    assert np.array_equal(bank.ask(items), expected)
    assert np.array_equal(bank.ask(items[::-1]), expected[:, ::-1])  # now it remembers them
    assert bank.count(items) == expected.sum(axis=0).tolist()


def test_asking_many_filters_at_once_agrees_with_asking_each() -> None:
    rng = random.Random(5)
    items = [rng.randbytes(32) for _ in range(40)]
    blooms = [BloomFilter.from_entropy(rng.randbytes(64)) for _ in range(32)]
    for bloom in blooms:
        bloom.add_many(rng.sample(items, 20))
    bank = FilterBank((b.keys, b.words) for b in blooms)
    assert np.array_equal(bank.ask(items), [b.contains_many(items) for b in blooms])
    assert bank.ask([]).shape == (32, 0)
    assert FilterBank([]).count(items) == [0] * 40


def test_what_is_remembered_is_bounded() -> None:
    bloom = BloomFilter([1], [0b10])
    bank = FilterBank([(bloom.keys, bloom.words)])
    items = [number.to_bytes(4, "big") for number in range(MAX_REMEMBERED + 1)]
    expected = bloom.contains_many(items)
    for start in range(0, len(items), 1000):
        part = slice(start, start + 1000)
        assert np.array_equal(bank.ask(items[part])[0], expected[part])
    assert np.array_equal(bank.ask(items[:10])[0], expected[:10])
    assert len(bank._known) <= MAX_REMEMBERED


def test_a_saturated_filter_claims_everything_and_says_so() -> None:
    bloom = BloomFilter(range(1, 9), [2**64 - 1] * BLOOM_WORDS)
    assert b"anything" in bloom
    assert bloom.false_positive_rate() == 1.0


def test_fresh_keys_come_from_the_callers_entropy() -> None:
    assert BloomFilter.from_entropy(bytes(range(64))).keys[0] == 0x0706050403020100
    with pytest.raises(ConfigurationError, match="64 bytes, got 3"):
        BloomFilter.from_entropy(b"abc")


def test_a_copy_is_equal_and_independent() -> None:
    bloom = BloomFilter(range(1, 9))
    copy = bloom.copy()
    assert copy == bloom
    copy.add(b"x")
    assert copy != bloom


@pytest.mark.parametrize(("keys", "words"), [([], None), ([2**64], None), ([-1], None), ([1], []), ([1], [2**64])])
def test_impossible_filters_are_refused(keys: list[int], words: list[int] | None) -> None:
    with pytest.raises(ConfigurationError):
        BloomFilter(keys, words)


def test_mixed_lengths_keep_their_places() -> None:
    bloom = BloomFilter(range(1, 9))
    bloom.add_many([b"", b"ab", b"abc"])
    assert np.array_equal(bloom.contains_many([b"abc", b"zz", b"", b"q", b"ab"]), [True, False, True, False, True])
