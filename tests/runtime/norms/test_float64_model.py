"""The float64 truth: the model's own, float64 throughout, independent of every lowering; the model stays as it was."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rmsnorm_deploy.models.reference as reference_module
import rmsnorm_deploy.runtime.norms.float64_model as float64_module
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.intercept import at_norms
from rmsnorm_deploy.models.reference import reference
from rmsnorm_deploy.models.spec import NormSpec
from rmsnorm_deploy.runtime.inputs.cases import Case
from rmsnorm_deploy.runtime.norms.float64_model import exactly, in_float64
from rmsnorm_deploy.runtime.validation.api import validate
from rmsnorm_deploy.runtime.validation.result import ValidationReport
from tests.helpers.models.families import FAMILIES, build
from tests.helpers.norms.norm_zoo import ZOO

IDS = torch.arange(3, 12)[None]


def logits(model: nn.Module, name: str) -> Tensor:
    feeds = {"input_ids": IDS, "decoder_input_ids": IDS} if name == "t5" else {"input_ids": IDS}
    with torch.no_grad():
        return model(**feeds).logits


def reference_of(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """In float64: what the model's own code gives, and what it gives with the reference at every norm."""
    sites = find_norms(model).sites
    with in_float64(model):
        own = logits(model, name)
        with at_norms(model, sites, exactly):
            return own, logits(model, name)


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("name", FAMILIES)
def test_own_code_in_float64_is_the_reference_and_not_a_plain_double_copy(name: str) -> None:
    model = build(name)
    own, exact = reference_of(model, name)
    assert own.dtype == exact.dtype == torch.float64
    scale = exact.abs().max()
    assert (own - exact).abs().max() / scale < 1e-12
    if name != "gpt_oss":  # its experts do not run in float64 without the context
        doubled = logits(copy.deepcopy(model).double(), name)
        assert 1e-10 < (exact - doubled).abs().max() / scale < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_models_in_half_types_have_a_float64_reference(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    own, exact = reference_of(model, name)
    assert exact.dtype == torch.float64
    scale = exact.abs().max()
    assert (own - exact).abs().max() / scale < 1e-12
    assert 1e-4 < (logits(model, name).double() - exact).abs().max() / scale < 0.2


class Casts(nn.Module):
    """Every way in which models ask for a narrower dtype; what comes out holds all bits of a float64."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.ones(1, dtype=torch.float16))
        self.register_buffer("turn", torch.ones(1, dtype=torch.complex64))
        self.register_buffer("index", torch.tensor([0]))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float().half().to(torch.bfloat16).type(torch.float16).to(dtype=torch.float32)
        y = y.type_as(self.narrow).to(self.narrow).to(self.narrow.dtype)
        y = y + torch.zeros(1, dtype=torch.float32) + torch.tensor(0.0, dtype=torch.float16)
        y = y.sum(0, keepdim=True, dtype=torch.float32) + torch.empty_like(y, dtype=torch.float16).fill_(0.0)
        pairs = torch.view_as_complex(torch.stack([y, torch.zeros_like(y)], -1)) * self.turn
        return torch.view_as_real(pairs)[..., 0] * torch.softmax(torch.zeros(1, 1), -1, dtype=torch.float32)[0]


def test_casts_to_narrower_dtypes_stay_in_float64() -> None:
    model, x = Casts().eval(), torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    with in_float64(model), torch.no_grad():
        y = model(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, x)
    assert not torch.equal(model(x.half()).double(), x)


class Written(nn.Module):
    """Values written into fresh tensors, some of which name no dtype."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        out.copy_(x)
        indexed = torch.empty(x.shape, dtype=torch.float32)
        indexed[:] = out
        summed = torch.zeros_like(x, dtype=torch.float16).index_add_(0, torch.arange(len(x)), indexed)
        return torch.ones(x.shape).mul_(summed)


def test_values_written_into_fresh_tensors_stay_in_float64() -> None:
    x = torch.tensor([1.0 + 2.0**-40, -3.0], dtype=torch.float64)
    with in_float64(nn.Identity()):
        y = Written()(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, x)


class Large(nn.Module):
    """Weights that are widened into memory that is used again, several in one operator and one seen transposed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.one, self.two, self.three = (
            nn.Parameter(torch.randn(300, 300, generator=generator) / 17) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = self.one * 1.0
        h = torch.addmm(self.two, self.one, self.three.t()) + torch.cat([self.one, self.two])[150:450]
        h = h @ self.three.t().reshape(300, 300) + kept
        return torch.nn.functional.linear(x, h) @ self.two.expand(2, 300, 300)


def test_large_weights_are_widened_without_mixing_them_up() -> None:
    model = Large().eval()
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        with in_float64(model):
            y = model(x.double())
        # No cast is inside, so a plain copy in float64 is the truth too.
        wanted = copy.deepcopy(model).double()(x.double())
    assert (y - wanted).abs().max() / wanted.abs().max() < 1e-14


# -------------------------------------------------------------------------------------------- what is left as it was


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Each tensor's identity, place in memory, dtype, gradient flag and bits."""
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (id(t), t.data_ptr(), t.dtype, t.requires_grad, bits(t)) for name, t in every}


class Tied(nn.Module):
    """Two names for one parameter, two parameters of one storage, a buffer, and an int buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.shared = nn.Parameter(self.embed.weight.data, requires_grad=False)
        self.norm = nn.RMSNorm(4, eps=1e-6)
        self.register_buffer("scale", torch.ones(4, dtype=torch.float16))
        self.register_buffer("steps", torch.arange(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x) * self.scale)) + (self.embed(x) @ self.shared.T)


def test_tensors_are_the_models_own_inside_and_outside() -> None:
    model = Tied().eval()
    before = tensors(model)
    with in_float64(model), torch.no_grad():
        assert model(torch.tensor([1])).dtype == torch.float64
        assert tensors(model) == before
    assert tensors(model) == before
    assert model.head.weight is model.embed.weight
    assert model.shared.data_ptr() == model.embed.weight.data_ptr()


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_the_model_is_as_before_after_an_exception(name: str) -> None:
    model = build(name, torch.float16)
    before, sites = tensors(model), find_norms(model).sites
    experts = getattr(model, "get_experts_implementation", lambda: None)()

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"), in_float64(model), at_norms(model, sites, fails):
        logits(model, name)
    assert tensors(model) == before
    assert all("forward" not in vars(module) for module in model.modules())
    assert getattr(model, "get_experts_implementation", lambda: None)() == experts
    # No cast is widened any more.
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32


def test_experts_run_one_by_one_inside_and_as_before_outside() -> None:
    model: Any = build("gpt_oss")
    before = model.get_experts_implementation()
    with in_float64(model):
        assert set(model.get_experts_implementation().values()) == {"eager"}
    assert model.get_experts_implementation() == before
    assert "eager" not in before.values()


def test_calls_of_one_norm_are_counted_in_one_context() -> None:
    norm = nn.RMSNorm(4, eps=1e-6)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm).eval()
    seen: list[tuple[str, int]] = []

    def visit(path: str, number: int, call: Any, original: Callable[[], Tensor]) -> Tensor:
        seen.append((path, number))
        return original()

    for _ in range(2):
        with at_norms(model, find_norms(model).sites, visit), torch.no_grad():
            model(torch.ones(1, 4))
    assert seen == [("0", 0), ("0", 1)] * 2


# ------------------------------------------------------------------------------------------------- independence


class OneNorm(nn.Module):
    """A linear layer and one norm of the zoo, with a gate where it takes one."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(64, 64, bias=False), ZOO[name].build(dtype)
        self.gate = nn.Linear(64, 64, bias=False) if ZOO[name].gated else None
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in (self.linear, self.gate):
                if module is not None:
                    module.weight.copy_(torch.randn(64, 64, generator=generator) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.norm(h) if self.gate is None else self.norm(h, self.gate(x))


def validated(name: str, dtype: torch.dtype, **options: Any) -> ValidationReport:
    """The model compared with itself: a candidate that is correct bit for bit."""
    model = OneNorm(name, dtype).to(dtype).eval()
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(6)).to(dtype).numpy()
    return validate(model, model, cases=[Case("x", {"x": x})], **options)


def without_root(spec: NormSpec, x: Any, weight: Any, bias: Any, gate: Any) -> Any:
    squares = np.mean(np.square(np.asarray(x, np.float64)), axis=-1, keepdims=True)
    return reference(spec, x, weight, bias, gate) / np.sqrt(squares + spec.eps)


def changed(**changes: Any) -> Callable[..., Any]:
    return lambda spec, *rest: reference(spec.replace(**changes), *rest)


def without_bias(spec: NormSpec, x: Any, weight: Any, bias: Any, gate: Any) -> Any:
    return reference(spec, x, weight, np.zeros_like(bias), gate)


# How a formula can be wrong, and a norm that shows it.
BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "eps dropped": ("llama", changed(eps=0.0)),
    "eps ten times too large": ("llama", lambda spec, *rest: reference(spec.replace(eps=10 * spec.eps), *rest)),
    "eps ten times too small": ("olmo2", lambda spec, *rest: reference(spec.replace(eps=spec.eps / 10), *rest)),
    "scale ignored": ("llama", changed(scale="none")),
    "1 + w taken for w": ("gemma2", changed(scale="weight")),
    "w taken for 1 + w": ("olmo2", changed(scale="one_plus_weight")),
    "sum for mean": ("torch", changed(reduction="sum")),
    "mean for sum": ("l2_weighted", changed(reduction="mean")),
    "gate before ignored": ("mamba2", changed(gate="none", activation="none")),
    "gate after ignored": ("qwen3_next", changed(gate="none", activation="none")),
    "gate after for before": ("mamba2", changed(gate="after")),
    "gate before for after": ("qwen3_next", changed(gate="before")),
    "sigmoid for silu": ("qwen3_next", changed(activation="sigmoid")),
    "group ignored": ("mamba2", changed(group_size=None)),
    "half the group": ("falcon_h1", changed(group_size=8)),
    "bias ignored": ("biased", without_bias),
    "root dropped": ("llama", without_root),
}


@pytest.mark.parametrize("name", sorted({name for name, _ in BROKEN.values()}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_compared_with_itself_passes(name: str, dtype: torch.dtype) -> None:
    report = validated(name, dtype)
    assert (report.verdict, len(report.norms), report.culprits) == ("pass", 1, [])


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        *((fault, torch.float32) for fault in BROKEN),
        *((fault, torch.float16) for fault, (name, _) in BROKEN.items() if name in ("llama", "olmo2", "gemma2")),
    ],
)
def test_a_wrong_formula_in_the_reference_cannot_hide(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate is perfect; only the truth is wrong. PyTorch itself is what gives it away."""
    name, wrong = BROKEN[fault]
    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.float64_model.reference", wrong)
    monkeypatch.setattr("rmsnorm_deploy.runtime.norms.torch_norms.reference", wrong)
    report = validated(name, dtype)
    assert (report.verdict, report.culprits) == ("cannot be judged", [])
    assert [check.passed for check in report.norms] == [None]
    assert "there is no valid reference" in report.norms[0].reason
    assert report.unjudged[0] == (report.norms[0].reason, ["norm norm"])
    assert ZOO[name].spec.describe() in report.norms[0].reason


# What the truth may rest on: nothing that rewrites, lowers or runs a deployed model, and not the eager spelling.
FORBIDDEN = ("rmsnorm_deploy.export", "rmsnorm_deploy.plugins", "rmsnorm_deploy.models.eager", "onnx")


def imports(path: Path, package: str) -> set[str]:
    """Full names of the modules that a file imports anywhere, those for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            found.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return found


def closure(module: Any) -> set[str]:
    """The modules that a module of this package imports, and those that they import, as the source says.

    The table of dtypes is looked at no further: it holds ONNX's names of dtypes, and computes nothing.
    """
    root = Path(reference_module.__file__).parents[1]
    pending, seen = {module.__name__}, set()
    while pending:
        name = pending.pop()
        seen.add(name)
        if name.startswith("rmsnorm_deploy.") and name != "rmsnorm_deploy.models.dtypes":
            path = root.joinpath(*name.split(".")[1:]).with_suffix(".py")
            pending |= imports(path, name.rpartition(".")[0]) - seen
    return seen


def test_the_reference_imports_numpy_and_the_spec_only() -> None:
    found = imports(Path(reference_module.__file__), "rmsnorm_deploy.models")
    assert found == {"__future__", "typing", "numpy", "numpy.typing", "rmsnorm_deploy.models.spec"}
    assert not any(name.partition(".")[0] == "torch" for name in closure(reference_module))


@pytest.mark.parametrize("module", [reference_module, float64_module])
def test_the_reference_shares_no_code_with_any_lowering(module: Any) -> None:
    found = closure(module)
    assert "rmsnorm_deploy.models.spec" in found
    assert [name for name in found if name.startswith(FORBIDDEN)] == []


def test_what_an_operator_returns_is_not_overwritten_by_the_next() -> None:
    """Some operators return a view of what they read without saying so; large operands are widened in shared memory."""
    first, second = torch.full((300, 300), 2.0), torch.full((300, 300), 3.0)
    with in_float64(nn.Identity()):
        view = torch.ops.aten._unsafe_view(first, [90000])
        other = torch.ops.aten._unsafe_view(second, [90000])
    assert view.dtype == other.dtype == torch.float64
    assert bool((view == 2.0).all())
    assert bool((other == 3.0).all())
