"""What an engine is built with: how values are written, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.tensorrt.options import NORM_CHOICES, PLUGIN_CHOICES, BuildOptions


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**changes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), ()),
        (89, (89,)),
        ("sm_89", (89,)),
        ("8.9,9.0", (89, 90)),
        ([86, "sm_90", "8.6"], (86, 90)),
        (("120",), (120,)),
    ],
)
def test_architectures_in_any_form(given: Any, expected: tuple[int, ...]) -> None:
    assert options(architectures=given).architectures == expected


@pytest.mark.parametrize(("given", "expected"), [((), ()), ("x:1,2,3", ("x:1,2,3",)), (["a", "b"], ("a", "b"))])
def test_profiles_in_any_form(given: Any, expected: tuple[str, ...]) -> None:
    assert options(profiles=given).profiles == expected


@pytest.mark.parametrize("norm", NORM_CHOICES)
@pytest.mark.parametrize("plugin", PLUGIN_CHOICES)
def test_all_choices_are_allowed(norm: str, plugin: str) -> None:
    made = options(norm=norm, plugin=plugin, workspace=1, memory_limit=1)
    assert (made.norm, made.plugin) == (norm, plugin)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"runtime": "openvino"}, "openvino"),
        ({"norm": "both"}, "norm"),
        ({"plugin": "rust"}, "rust"),
        ({"architectures": "ada"}, "ada"),
        ({"architectures": 8}, "8"),
        ({"workspace": 0}, "workspace"),
        ({"memory_limit": -5}, "-5"),
    ],
)
def test_refusals(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        options(**changes)


def test_options_come_back_from_json() -> None:
    made = options(
        runtime="tensorrt", profiles="x:1,2,3", norm="plugin", architectures=[89, 90], workspace=64, refit=True
    )
    values = made.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(BuildOptions)}
    assert json.loads(json.dumps(values)) == values
    assert (values["profiles"], values["architectures"]) == (["x:1,2,3"], [89, 90])
    assert BuildOptions(**values) == made
