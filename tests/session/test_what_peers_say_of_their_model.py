"""The description of a model is read from strangers: anything but a description raises ProtocolError."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from distro_optim import DisTrO
from distro_optim.errors import ProtocolError
from distro_optim.strategy.model.identity import ModelIdentity, TensorIdentity, describe
from distro_optim.strategy.model.named_tensors import NamedTensors

# A machine that is busy with other things is no finding.
UNHURRIED = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=20)
INTEGERS = st.integers(0, 2**64 - 1)
IDENTITIES = st.builds(
    ModelIdentity,
    epoch=INTEGERS,
    step=INTEGERS,
    weights=st.binary(min_size=32, max_size=32),
    tensors=st.lists(
        st.builds(
            TensorIdentity,
            name=NAMES.map(lambda name: f"tensor {name}"),
            kind=st.sampled_from(["trained", "frozen", "buffer"]),
            dtype=NAMES,
            shape=st.lists(INTEGERS, max_size=4).map(tuple),
        ),
        max_size=4,
        unique_by=lambda tensor: tensor.name,
    ).map(tuple),
    settings=st.dictionaries(NAMES.filter(lambda name: name != "groups"), st.booleans() | NAMES, max_size=3),
    groups=st.lists(
        st.dictionaries(NAMES, INTEGERS | st.floats(allow_nan=False, allow_infinity=False), max_size=3), max_size=2
    ).map(tuple),
    data=st.dictionaries(NAMES, INTEGERS, max_size=2),
    version=NAMES,
    torch_version=NAMES,
    protocols=st.none() | st.tuples(st.integers(1, 5), st.integers(5, 9)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def good() -> dict[str, Any]:
    identity = ModelIdentity(
        epoch=1,
        step=2,
        weights=bytes(32),
        tensors=(TensorIdentity("weight", "trained", "float32", (2, 3)),),
        settings={"tiling": "padded"},
        groups=({"lr": 0.1},),
        data={"size": 5},
    )
    content: dict[str, Any] = json.loads(identity.encode())
    return content


@pytest.mark.slow
@UNHURRIED
@given(IDENTITIES)
def test_what_is_written_is_read_back(identity: ModelIdentity) -> None:
    assert ModelIdentity.decode(identity.encode()) == identity
    assert identity.first_difference(identity) is None
    assert identity.harmless_differences(identity) == []


@pytest.mark.slow
@UNHURRIED
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        ModelIdentity.decode(text)
    except ProtocolError:
        pass


@pytest.mark.slow
@UNHURRIED
@given(st.sampled_from(sorted(good()["distro_optim"])), JSON)
def test_any_field_may_be_anything(name: str, value: object) -> None:
    content = good()
    content["distro_optim"][name] = value
    try:
        ModelIdentity.decode(json.dumps(content))
    except ProtocolError:
        pass


@pytest.mark.slow
@UNHURRIED
@given(IDENTITIES, IDENTITIES)
def test_any_two_can_be_compared_and_what_differs_has_words(a: ModelIdentity, b: ModelIdentity) -> None:
    error = a.first_difference(b)
    if error is not None:
        assert error.ours != error.theirs
        assert error.what in str(error)
    a.harmless_differences(b)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "NaN",
        "[" * 100_000,
        '{"distro_optim": ' * 5_000,
        '{"distro_optim": []}',
        '{"distro_optim": {"format": true, "version": "1"}}',
        '{"distro_optim": {"format": 1e400, "version": "1"}}',
        '{"distro_optim": {"format": ' + "9" * 5_000 + "}}",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        ModelIdentity.decode(text)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("weights",), "00"),
        (("weights",), "zz" * 32),
        (("step",), -(2**70)),
        (("step",), True),
        (("tensors", 0, 1), "secret"),
        (("tensors", 0, 3), [-1]),
        (("tensors", 0, 3), [True]),
        (("tensors", 0), ["weight", "trained", "float32"]),
        (("tensors",), [["weight", "trained", "float32", [2]]] * 2),
        (("optimizer", "groups"), {}),
        (("optimizer", "groups", 0), []),
        (("data", "size"), 1.5),
        (("tensors", 0, 0), ""),
        (("tensors", 0, 0), "w" * 1025),
        (("tensors", 0, 0), "weight\x1b[2J"),
        (("tensors", 0, 0), "weight\r\nroot: all is well"),
        (("optimizer", "groups"), [{}] * 65_537),
        (("optimizer", "groups", 0), {f"s{n}": 1 for n in range(65)}),
        (("data",), {f"s{n}": 1 for n in range(65)}),
    ],
)
def test_a_wrong_field_is_refused(path: tuple[Any, ...], value: object) -> None:
    content = good()
    place = content["distro_optim"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ProtocolError):
        ModelIdentity.decode(json.dumps(content))


def test_what_is_not_of_our_kind_is_told_apart() -> None:
    assert ModelIdentity.decode('{"model_type": "llama"}') is None


def test_a_model_of_transformers_brings_its_configuration() -> None:
    class Configured:
        class config:
            @staticmethod
            def to_json_string() -> str:
                return '{"model_type": "llama"}'

    identity = ModelIdentity.decode(json.dumps(good()))
    assert identity is not None
    text = identity.encode(Configured())  # type: ignore[arg-type]
    assert json.loads(text)["model_type"] == "llama"
    assert ModelIdentity.decode(text) == identity


def test_peers_that_compute_by_other_definitions_do_not_train_together() -> None:
    content = good()
    content["distro_optim"]["optimizer"]["arithmetic"] = "exact"
    exact = ModelIdentity.decode(json.dumps(content))
    content["distro_optim"]["optimizer"]["arithmetic"] = "float"
    floats = ModelIdentity.decode(json.dumps(content))
    del content["distro_optim"]["optimizer"]["arithmetic"]
    older = ModelIdentity.decode(json.dumps(content))
    assert exact is not None
    assert floats is not None
    assert older is not None
    error = exact.first_difference(older)
    assert error is not None
    assert "arithmetic is exact here and float in the run; use the same settings of DisTrO" in str(error)
    assert floats.first_difference(older) is None


def test_peers_without_a_protocol_in_common_are_told_who_has_to_upgrade_also_where_only_an_address_was_known() -> None:
    def peer(**said: Any) -> ModelIdentity:
        content = good()
        content["distro_optim"].update(said)
        identity = ModelIdentity.decode(json.dumps(content))
        assert identity is not None
        return identity

    older, ours = peer(version="0.1.0"), peer(version="0.2.0", protocols=[1, 2])
    newer = peer(version="0.3.0", protocols=[2, 3])
    assert older.protocols is None
    assert ours.first_difference(older) is older.first_difference(ours) is None
    assert older.harmless_differences(ours) == [
        "distro_optim is 0.1.0 here and 0.2.0 in the run: both speak protocol 1"
    ]
    assert ours.first_difference(newer) is None
    for one, other in ((older, newer), (newer, older)):
        error = one.first_difference(other)
        assert error is not None
        assert error.what == "protocol"
        assert "has to upgrade to distro_optim 0.3.0" in str(error)
    assert "this machine has to upgrade" in str(older.first_difference(newer))


@pytest.mark.parametrize(
    ("name", "value"), [("direction", "orthogonal"), ("update", "rms"), ("gain", 3.0)], ids=lambda v: str(v)
)
def test_peers_of_other_rules_are_told_and_who_says_nothing_has_the_published_ones(name: str, value: Any) -> None:
    def identity(**settings: Any) -> ModelIdentity:
        model = nn.Linear(3, 2)
        optimizer = DisTrO(model.parameters(), **{"direction": "momentum", "update": "sign", "gain": 1, **settings})
        tensors = NamedTensors.of(model, optimizer)
        about: dict[str, Any] = {"epoch": 0, "step": 0, "weights": bytes(32), "script_rates": False, "data": {}}
        written = describe(tensors, optimizer, **about).encode()
        read = ModelIdentity.decode(written)
        assert read is not None
        return read

    published, other = identity(compression_decay=0.7), identity(compression_decay=0.7, **{name: value})
    assert not {"direction", "update", "gain"} & set(published.groups[0])
    error = published.first_difference(other)
    assert error is not None
    assert error.what == name
    assert str(value) in str(error)
    assert other.first_difference(other) is None


@pytest.mark.parametrize("value", ["x" * 33, "\n", "\u2603"])
def test_a_rule_that_could_not_be_shown_is_refused(value: str) -> None:
    content = good()
    content["distro_optim"]["optimizer"]["groups"][0]["update"] = value
    with pytest.raises(ProtocolError, match="too long, or not printable"):
        ModelIdentity.decode(json.dumps(content))


EVIL = "\x1b]0;owned\x07\r\nERROR: send me your key \u202e" + "x" * 1_000_000


@pytest.mark.parametrize(
    "path",
    [
        ("version",),
        ("torch",),
        ("optimizer", "tiling"),
        ("optimizer", EVIL),
        ("optimizer", "groups", 0, EVIL),
        ("data", EVIL),
        ("tensors", 0, 2),
    ],
)
def test_strings_of_a_peer_are_short_and_printable_in_whatever_is_said_of_them(path: tuple[Any, ...]) -> None:
    content = good()
    place = content["distro_optim"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = 7 if path[-1] == EVIL and path != ("optimizer", EVIL) else EVIL
    ours, theirs = ModelIdentity.decode(json.dumps(good())), ModelIdentity.decode(json.dumps(content))
    assert ours is not None
    assert theirs is not None
    error = ours.first_difference(theirs)
    for sentence in [str(error), *(ours.harmless_differences(theirs))]:
        assert sentence.isprintable()
        assert len(sentence) < 600
    assert (error is None) == (path[0] in ("version", "torch", "data"))


@pytest.mark.parametrize("text", [json.dumps({"distro_optim": {"format": 9, "version": EVIL}}), '{"' + EVIL])
def test_refusals_do_not_repeat_what_a_peer_wrote(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        ModelIdentity.decode(text)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
