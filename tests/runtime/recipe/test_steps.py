"""The steps of a row: their order, what each reads, and that every field of a recipe is a fact of one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from rmsnorm_deploy import ValidationOptions, package_model
from rmsnorm_deploy.export.from_torch.export_model import ExportOptions
from rmsnorm_deploy.runtime.recipe.fields import Settings, default_of, names_of
from rmsnorm_deploy.runtime.recipe.rows import NEEDS
from rmsnorm_deploy.runtime.recipe.step_options import build_options, validation_options
from rmsnorm_deploy.runtime.recipe.steps import FIELDS, kind_of, steps_of, subject_of
from rmsnorm_deploy.runtime.tensorrt.options import BuildOptions

_PLAIN = {"build": [], "runners": ["ort"], "package": [], "backend": "onnxruntime"}


def _after(*, is_onnx: bool = False, **options: Any) -> dict[str, tuple[str, ...]]:
    return {step.step: step.after for step in steps_of({**_PLAIN, **options}, is_onnx=is_onnx)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"export": (), "validate": ("export",)}),
        ({"is_onnx": True, "runners": []}, {"rewrite": ()}),
        (
            {"package": ["triton"], "runners": []},
            {"export": (), "package:triton": ("export",)},
        ),
        (
            {"build": ["rtx"], "runners": ["ort", "rtx"], "package": ["triton"]},
            {
                "export": (), "validate": ("export",), "build:rtx": ("export", "validate"),
                "validate:rtx": ("build:rtx",), "package:triton": ("export", "validate"),
            },
        ),
        (
            {"build": ["rtx", "tensorrt"], "runners": ["tensorrt"], "package": ["triton"], "backend": "tensorrt"},
            {
                "export": (), "build:rtx": ("export",), "build:tensorrt": ("export",),
                "validate:tensorrt": ("build:tensorrt",),
                "package:triton": ("export", "build:tensorrt", "validate:tensorrt"),
            },
        ),
    ],
)  # fmt: skip
def test_the_steps_and_what_they_read(options: dict[str, Any], expected: dict[str, tuple[str, ...]]) -> None:
    assert _after(**options) == expected


def test_names_of_steps() -> None:
    steps = steps_of({**_PLAIN, "build": ["rtx"], "runners": ["ort", "rtx"], "package": ["triton"]}, is_onnx=False)
    assert [(kind_of(step.step), subject_of(step.step)) for step in steps] == [
        (step.kind, step.subject) for step in steps
    ]


def test_every_field_is_a_fact_of_a_step_or_says_which_steps_there_are() -> None:
    known = {fact for names in FIELDS.values() for fact in names} | {"provider", "backend", "max_batch"}
    which = {"targets", "dtypes", "build", "validate", "runners", "package"}
    assert set(names_of(Settings)) == (known - {"target", "dtype", "must_be_proven"}) | which | set(NEEDS)


def test_defaults_are_those_of_the_commands() -> None:
    export = {field.name: field.default for field in dataclasses.fields(ExportOptions)}
    same = ("opset", "quantize", "with_past", "function", "ort_trt")
    assert {name: default_of(name) for name in same} == {name: export[name] for name in same}
    assert export["attention"] == "node"
    names = (*FIELDS["build"], *names_of(Settings))
    assert build_options({name: default_of(name) for name in names}, "rtx") == BuildOptions()
    assert validation_options({name: default_of(name) for name in names}) == ValidationOptions()
    package = inspect.signature(package_model).parameters
    assert default_of("max_batch") == package["max_batch"].default
