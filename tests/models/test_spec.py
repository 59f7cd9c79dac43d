"""NormSpec: what may be said, how it is written down, how it reads."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.norms.norm_zoo import BARE, CAST_FIRST, FALCON, MAMBA, NO_UPCAST, ONE_PLUS, SCALE_FIRST, ZOO

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"scale": "gain"}, "NormSpec.scale is 'gain'; it must be one of none, weight, one_plus_weight"),
    "order": ({"order": "cast"}, "NormSpec.order is 'cast'; it must be one of scale_then_cast, cast_then_scale"),
    "statistics": ({"statistics": "float64"}, "NormSpec.statistics is 'float64'"),
    "root": ({"root": "pow"}, "NormSpec.root is 'pow'"),
    "reduction": ({"reduction": "max"}, "NormSpec.reduction is 'max'"),
    "gate": ({"gate": "both"}, "NormSpec.gate is 'both'"),
    "activation": ({"activation": "gelu"}, "NormSpec.activation is 'gelu'"),
    "eps_none": ({"eps": None}, "NormSpec.eps is None; it must be a number of at least 0"),
    "eps_text": ({"eps": "1e-6"}, "NormSpec.eps is '1e-6'"),
    "eps_negative": ({"eps": -1e-6}, "NormSpec.eps is -1e-06"),
    "eps_nan": ({"eps": math.nan}, "NormSpec.eps is nan"),
    "no_dims": ({"trailing_dims": 0}, "NormSpec.trailing_dims is 0; it must be at least 1"),
    "empty_groups": ({"group_size": 0}, "group_size must be at least 1"),
    "groups_of_two_dims": ({"group_size": 4, "trailing_dims": 2}, "requires trailing_dims to be 1"),
    "gate_without_activation": ({"gate": "after"}, "must both be given, or neither"),
    "activation_without_gate": ({"activation": "silu"}, "must both be given, or neither"),
    "no_upcast_in_float32": ({"order": "no_upcast"}, "'no_upcast' and NormSpec.statistics 'input' require each other"),
    "input_with_a_cast": ({"statistics": "input"}, "'no_upcast' and NormSpec.statistics 'input' require each other"),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_spec_that_says_nothing_possible_is_an_error(name: str) -> None:
    values, message = INVALID[name]
    with pytest.raises(UsageError, match=message) as raised:
        NormSpec(**{"eps": 1e-6, **values})
    assert raised.value.exit_code == 2
    with pytest.raises(UsageError, match=message):
        SCALE_FIRST.replace(**values)
    with pytest.raises(UsageError, match=message):
        NormSpec.from_dict({"eps": 1e-6, **values})


@pytest.mark.parametrize("name", ZOO)
def test_json_round_trip(name: str) -> None:
    spec = ZOO[name].spec
    assert NormSpec.from_json(spec.to_json()) == spec
    assert NormSpec.from_dict(spec.to_dict()) == spec
    assert json.loads(spec.to_json()) == spec.to_dict()
    assert "\n" not in spec.to_json()


@pytest.mark.parametrize("eps", [0.0, 1e-6, 2.0**-23, 2.0**-52, 1.234567890123e-7, 5e-324, 0.5])
def test_eps_keeps_every_bit_on_its_way_through_json(eps: float) -> None:
    assert NormSpec.from_json(NormSpec(eps=eps).to_json()).eps.hex() == eps.hex()


def test_equal_specs_give_equal_text_and_different_ones_do_not() -> None:
    texts = {norm.spec.to_json() for norm in ZOO.values()}
    assert len(texts) == len({norm.spec for norm in ZOO.values()})
    turned = dict(reversed(list(SCALE_FIRST.to_dict().items())))
    assert NormSpec.from_dict(turned).to_json() == SCALE_FIRST.to_json()


def test_the_dict_has_every_field() -> None:
    assert list(SCALE_FIRST.to_dict()) == [f.name for f in dataclasses.fields(NormSpec)]


def test_fields_left_out_have_their_defaults() -> None:
    assert NormSpec.from_dict({"eps": 1e-6}) == NormSpec(eps=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a NormSpec"),
        ("{eps: 1}", "not a NormSpec"),
        ('{"eps": 1e-6, "color": 1, "age": 2}', "unknown NormSpec fields: age, color; expected those of this version"),
        ('{"eps": -1}', "NormSpec.eps is -1"),
        ("[]", "not a NormSpec"),
        ("3", "not a NormSpec"),
        ("{}", "eps"),
        ('{"eps": 1e-6, "trailing_dims": "2"}', "trailing_dims"),
    ],
)
def test_text_that_is_no_spec_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NormSpec.from_json(text)


def test_a_spec_cannot_be_changed_and_can_be_a_key() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCALE_FIRST.eps = 1.0  # type: ignore[misc]
    assert {SCALE_FIRST: 1}[NormSpec(eps=1e-6)] == 1
    assert SCALE_FIRST.replace(eps=1.0) != SCALE_FIRST
    assert SCALE_FIRST.eps == 1e-6


def test_has_weight() -> None:
    assert [spec.has_weight for spec in (BARE, SCALE_FIRST, ONE_PLUS)] == [False, True, True]


DESCRIPTIONS = {
    "weight, scale-then-cast, eps 1e-06": SCALE_FIRST,
    "weight, cast-then-scale, eps 1e-06": CAST_FIRST,
    "1 + weight, scale-then-cast, eps 1e-06": ONE_PLUS,
    "no weight, scale-then-cast, eps 1e-06": BARE,
    "weight, no-upcast, eps 1e-06": NO_UPCAST,
    "no weight, cast-factor, eps 1e-06": BARE.replace(order="cast_factor"),
    "weight, scale-then-cast, eps 1.19e-07": SCALE_FIRST.replace(eps=2.0**-23),
    "weight, scale-then-cast, eps 0": SCALE_FIRST.replace(eps=0.0),
    "weight, scale-then-cast, eps 1e-06, last 2 dims": SCALE_FIRST.replace(trailing_dims=2),
    "weight, cast-then-scale, eps 1e-06, groups of 16, silu gate before": MAMBA,
    "weight, scale-then-cast, eps 1e-06, groups of 16, silu gate after": FALCON,
    "weight, scale-then-cast, eps 1e-06, sigmoid gate after, bias": SCALE_FIRST.replace(
        gate="after", activation="sigmoid", bias=True
    ),
    "no weight, scale-then-cast, eps 1e-06, sum (L2)": BARE.replace(reduction="sum"),
}


@pytest.mark.parametrize("text", DESCRIPTIONS)
def test_describe(text: str) -> None:
    assert DESCRIPTIONS[text].describe() == text
