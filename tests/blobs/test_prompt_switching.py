"""The switch interval is short during transfers and afterwards as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from blobs.conftest import Peer
from blobs.samples import sample
from distro_optim.comm.iroh.blobs import net
from distro_optim.comm.iroh.blobs.switch_interval import SWITCH_SECONDS, prompt_switching

pytestmark = pytest.mark.waiting


@pytest.fixture(autouse=True)
def interval() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(before)


def test_it_is_short_within_and_restored_by_the_last_to_leave() -> None:
    with prompt_switching():
        with prompt_switching():
            assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_it_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), prompt_switching():
        raise RuntimeError
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_a_shorter_one_is_left_alone() -> None:
    sys.setswitchinterval(0.0002)
    with prompt_switching():
        assert sys.getswitchinterval() == pytest.approx(0.0002, abs=2e-6)
    assert sys.getswitchinterval() == pytest.approx(0.0002, abs=2e-6)


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    with prompt_switching():
        sys.setswitchinterval(0.02)
    assert sys.getswitchinterval() == pytest.approx(0.02)


@pytest.mark.parametrize(("size", "transfers"), [(5000, 0), (16_000, 0), (2**21, 2)])
def test_only_a_long_transfer_asks_for_it_on_both_sides(
    make_peer: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch, size: int, transfers: int
) -> None:
    asked = []

    def counted() -> AbstractContextManager[None]:
        asked.append(size)
        return prompt_switching()

    monkeypatch.setattr(net, "prompt_switching", counted)
    provider, getter = make_peer(), make_peer()
    root = provider.store.add(sample(size), tag="t")
    assert bytes(getter.fetch(root, [provider.id])) == sample(size)
    assert len(asked) == transfers
