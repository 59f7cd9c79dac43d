"""What torch's exporter says when it fails, real and as text, and the advice for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture import causes
from rmsnorm_deploy.export.capture.capture import capture
from rmsnorm_deploy.export.capture.causes import CAUSES, OTHER, explained
from rmsnorm_deploy.models.errors import UnsupportedError


class DataParallel(nn.Module):
    pass


class PeftModelForCausalLM(nn.Module):
    pass


class Plain(nn.Module):
    pass


TEXTS = [
    ("parallel", DataParallel(), RuntimeError("x"), "DataParallel distributes another model over devices. Export that "
     "model, its attribute .module."),
    ("adapters", PeftModelForCausalLM(), RuntimeError("x"), "model.merge_and_unload()"),
    ("no function", Plain(), RuntimeError("No ONNX function found for <OpOverload(op='aten.special_i0e', "
     "overload='default')>. Failure message: No decompositions registered"), "the operator aten.special_i0e."),
    ("missing decomposition", Plain(), RuntimeError("No decompositions registered for the real-valued input: "
     "aten.linalg_eig"), "cannot decompose aten.linalg_eig."),
    ("complex", Plain(), RuntimeError("view_as_complex is not supported"), "rotates with cos and sin"),
    ("experts", Plain(), RuntimeError("aten::_grouped_mm failed"), 'set_experts_implementation("batched_mm")'),
    ("output type", Plain(), RuntimeError("It looks like one of the outputs with type `<class 'Out'>` is not "
     "supported or pytree-flattenable."), "return_dict=False"),
    ("input type", Plain(), RuntimeError("It looks like one of the inputs with type `<class 'In'>` is not "
     "supported or pytree-flattenable."), "Give tensors, or tuples and dicts of tensors."),
    ("data-dependent", Plain(), RuntimeError("Could not guard on data-dependent expression Eq(u0, 1)"),
     "torch.where or torch.cond"),
    ("data-dependent", Plain(), TypeError("unhashable type: non-nested SymInt"), "torch.where or torch.cond"),
    ("data-dependent", Plain(), RuntimeError(".numpy() is not supported for tensor subclasses."), "by the values"),
    ("fixed size", Plain(), ValueError("Constraints violated (batch)! For more information"), "--static"),
    ("fixed size", Plain(), ValueError("You marked L['x'].size()[0] as dynamic but your code specialized it"),
     "--inputs"),
    ("vmap", Plain(), RuntimeError("vmap: the call of .item() on a BatchedTensor"), "attention implementation"),
    ("compiled", Plain(), RuntimeError("BackendCompilerFailed: inductor"), "_orig_mod"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "model", "error", "advice"), TEXTS, ids=[row[0] for row in TEXTS])
def test_each_cause_has_its_advice(name: str, model: nn.Module, error: Exception, advice: str) -> None:
    text = str(explained(model, error))
    first = " ".join(str(error).split()).rstrip(" .")
    assert text.startswith(f"{type(model).__name__} could not be captured by torch's exporter: {first}. ")
    assert advice in text
    cause = next(cause for cause in CAUSES if cause.name == name)
    assert text.endswith((cause.advice.partition("{0}")[2] or cause.advice)[-20:])


def test_every_cause_has_a_text() -> None:
    assert {row[0] for row in TEXTS} == {cause.name for cause in CAUSES}


def test_other_errors_get_general_advice_and_a_remark_on_untested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "newer_than_tested", lambda name: f"{name} is new" if name == "torch" else "")
    text = str(explained(Plain(), ValueError("first line\nsecond")))
    assert text == f"Plain could not be captured by torch's exporter: first line. {OTHER} Note: torch is new."


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class NoFunction(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return torch.special.i0e(x)


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.polar(x, x).cumprod(0))


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (Branches(), "torch.where or torch.cond"),
        (NoFunction(), "has no function for the operator prims.bessel_i0e."),
        (Complex(), "cos and sin"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_real_models_that_fail(model: nn.Module, advice: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        capture(model, {"x": torch.ones(4, 4)}, dynamic=False)
    assert advice in str(raised.value)


class Router(nn.Module):
    """Converts its classifier in every call, as the routers of Switch Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.classifier = self.classifier.to(torch.float32)
        result: Tensor = self.classifier(x)
        return result


def test_a_conversion_to_the_dtype_that_a_module_has_is_no_obstacle() -> None:
    captured = capture(Router().eval(), {"x": torch.randn(2, 4)})
    assert [value.name for value in captured.model.graph.inputs] == ["x"]
    router = Router()
    assert router.half().classifier.weight.dtype == torch.float16


class Checks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.ndim == 3)
        return x + 1


def test_the_message_names_the_line_of_the_model_and_the_check_that_failed() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"at capture/test_causes\.py:\d+: torch\._check\(x\.ndim == 3\) does not hold\. ",
    ):
        capture(Checks().eval(), {"x": torch.randn(2, 3)})
