"""Merkle trees: the reference's roots and paths, and every way to cheat with a path that we know of."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distro_optim.errors import ProtocolError
from distro_optim.verify.merkle import EMPTY_ROOT, MerkleProof, MerkleTree, ProofStep, leaf_hash, merkle_root

PIZZA = b"my very eager mother just served us nine pizzas make prime".split()


@pytest.mark.parametrize(
    ("items", "root"),
    [
        (PIZZA, "b40c847546fdceea166f927fc46c5ca33c3638236a36275c1346d3dffb84e1bc"),
        ([b"test"], "dbebd10e61bc8c28591273feafbbef95d544f874693301d8f7f8e54c6e30058e"),
        ([b"a", b"b"], "b137985ff484fb600db93107c77b0365c80d78f5b429ded0fd97361d077999eb"),
        ([b"a", b"b", b"c"], "e9636069c740c9ff51625b01a0b040396d265a9b920cc6febdfa5ecc9f58ecce"),
        (
            [bytes.fromhex("4b0236be5a7bcbef4130e7222fd350e8462b0b75f5ffba61d5ddf36f1d3c2ce7")],
            "ee93c4a7f33abafd65e61191440533a5ca23e95c6dd9e5e753f203f278de25db",
        ),
    ],
)
def test_roots_of_the_reference(items: list[bytes], root: str) -> None:
    assert merkle_root(items).hex() == root
    assert MerkleTree(items).root == bytes.fromhex(root)


def test_nothing_has_no_root_and_callers_send_zeros() -> None:
    assert MerkleTree([]).root is None
    assert MerkleTree([]).prove(0) is None
    assert merkle_root([]) == EMPTY_ROOT == bytes(32)


def test_the_path_of_the_last_of_eleven_words() -> None:
    proof = MerkleTree(PIZZA).prove(10)
    assert proof is not None
    assert [step.target.hex()[:8] for step in proof.steps[:3]] == ["9388bd20", "96510860", "567ccecc"]
    siblings = [(step.left_sibling or step.right_sibling or b"").hex()[:8] for step in proof.steps]
    assert siblings == ["d75567d7", "db6dbb20", "96510860", "747cf591"]
    assert [step.left_sibling is not None for step in proof.steps] == [False, True, False, True]


def test_every_path_verifies_and_no_other_word_does() -> None:
    tree = MerkleTree(PIZZA)
    root = tree.root
    assert root is not None
    for index, word in enumerate(PIZZA):
        proof = tree.prove(index)
        assert proof is not None
        assert proof.verify(word, root)
        assert not proof.verify(b"bad", root)
        assert not proof.is_consistent(leaf_hash(b"missing"))
    assert tree.prove(len(PIZZA)) is None
    assert tree.prove(-1) is None


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_any_leaf_of_any_tree_can_be_proved(items: list[bytes], data: st.DataObject) -> None:
    tree = MerkleTree(items)
    index = data.draw(st.integers(0, len(items) - 1))
    proof = tree.prove(index)
    assert proof is not None
    assert tree.root == merkle_root(items)
    assert proof.verify(items[index], merkle_root(items))
    other = data.draw(st.binary(max_size=8))
    assert proof.verify(other, merkle_root(items)) == (other == items[index])


def test_an_empty_path_is_consistent_but_verifies_only_the_root_itself() -> None:
    empty = MerkleProof(())
    assert empty.is_consistent(leaf_hash(b"anything"))
    assert empty.verify(b"test", merkle_root([b"test"]))
    assert not empty.verify(b"anything", merkle_root(PIZZA))


def test_a_made_up_path_is_consistent_but_does_not_reach_a_trusted_root() -> None:
    mine = MerkleTree([b"mine", b"forged"])
    proof = mine.prove(1)
    assert proof is not None
    assert proof.is_consistent(leaf_hash(b"forged"))
    assert not proof.verify(b"forged", merkle_root(PIZZA))


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert merkle_root([left + right]) != merkle_root([b"a", b"b"])
    assert hashlib.sha256(b"\x01" + left + right).digest() == merkle_root([b"a", b"b"])


@pytest.mark.parametrize("siblings", [(None, None), (EMPTY_ROOT, EMPTY_ROOT), (b"short", None)])
def test_a_step_without_exactly_one_whole_sibling_is_refused(siblings: tuple[bytes | None, bytes | None]) -> None:
    with pytest.raises(ProtocolError):
        ProofStep(EMPTY_ROOT, *siblings)


def test_a_path_longer_than_any_tree_is_refused() -> None:
    step = ProofStep(EMPTY_ROOT, left_sibling=EMPTY_ROOT)
    with pytest.raises(ProtocolError, match="at most 64 steps"):
        MerkleProof((step,) * 65)


def test_swapping_the_sides_of_a_step_breaks_the_path() -> None:
    proof = MerkleTree([b"a", b"b"]).prove(0)
    assert proof is not None
    step = proof.steps[0]
    swapped = dataclasses.replace(step, left_sibling=step.right_sibling, right_sibling=None)
    assert not MerkleProof((swapped,)).verify(b"a", merkle_root([b"a", b"b"]))
