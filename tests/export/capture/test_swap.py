"""Swapped norms: the same bits, everything put back, and every site that does not follow its spec found out."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture.capture import capture
from rmsnorm_deploy.export.capture.swap import swapped
from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.export.graph.captured_nodes import CAPTURE_DOMAIN, NORM_OP
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.site import Recognition, Site
from rmsnorm_deploy.models.spec import NormSpec
from tests.helpers.norms.norm_zoo import (
    BARE,
    CAST_FIRST,
    DTYPES,
    ZOO,
    TakesMore,
    Weighted,
    hub_class,
    normalized,
    randomized,
)


class Model(nn.Module):
    """Calls its norms several times, one of them through a list, one with a gate by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RMSNorm(64, eps=1e-6)
        self.layers = nn.ModuleList([Weighted(64), ZOO["gemma2"].make()])
        self.gated = ZOO["mamba2"].make()
        self.bare = ZOO["nanochat"].make()
        self.linear = nn.Linear(64, 64)
        self.other = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(self.first(x))
        for layer in self.layers:
            x = x + layer(x)
        x = self.gated(x, gate=self.other(x)) + self.gated(hidden_states=x)
        return self.bare(self.first(x)) + self.layers[0](x)


def build(dtype: torch.dtype = torch.float32) -> Model:
    return randomized(Model()).to(dtype).eval()  # type: ignore[return-value]


def sites_of(model: nn.Module) -> list[Site]:
    return find_norms(model).sites


def x_of(dtype: torch.dtype = torch.float32, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, 64), generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_not_swapped(model: nn.Module) -> None:
    for module in model.modules():
        assert "forward" not in vars(module)
        assert module.forward.__func__ is type(module).forward  # type: ignore[attr-defined]


# The same bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_swapped_model_is_bit_equal_and_put_back(dtype: torch.dtype, check: bool) -> None:
    model = build(dtype)
    sites = sites_of(model)
    assert [site.path for site in sites] == ["first", "layers.0", "layers.1", "gated", "bare"]
    with torch.no_grad():
        wanted = model(x_of(dtype))
        with swapped(model, sites, check=check) as report:
            assert all("forward" in vars(model.get_submodule(site.path)) for site in sites)
            got = model(x_of(dtype))
        again = model(x_of(dtype))
    assert got.dtype == wanted.dtype == dtype
    assert torch.equal(got, wanted)
    assert torch.equal(again, wanted)
    assert report.differing == {}
    assert_not_swapped(model)


@pytest.mark.parametrize("name", ZOO)
def test_every_norm_of_the_zoo_swapped_is_bit_equal(name: str) -> None:
    norm = ZOO[name]
    module = norm.build(torch.float16)
    site = Site("", "", norm.spec, norm.site_width, "float16", norm.weight or None, norm.bias or None)
    x, gate = x_of(torch.float16, 3, 5, *norm.tail), x_of(torch.float16, 3, 5, *norm.tail)
    arguments = (x, gate) if norm.gated else (x,)
    with torch.no_grad():
        wanted = module(*arguments)
        with swapped(module, [site], check=True) as report:
            assert torch.equal(module(*arguments), wanted)
    assert report.differing == {}


# What the spec replaces, counted outside of the module: a norm that changes its own state is refused.
CALLS: list[torch.Size] = []


def test_while_swapped_the_spec_computes_and_the_module_does_not() -> None:
    class Once(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            CALLS.append(x.shape)
            return normalized(x) * self.weight

    model = Once(64)
    sites = sites_of(model)
    for check in (False, True):
        CALLS.clear()
        with swapped(model, sites, check=check):
            model(x_of())
        assert CALLS[:1] == ([(2, 5, 64)] if check else [])


def test_while_checked_a_result_has_the_strides_of_the_module() -> None:
    norm = nn.RMSNorm(16, eps=1e-6)
    x = torch.randn(2, 16, 5).transpose(1, 2)
    wanted = norm(x)
    with swapped(norm, find_norms(norm).sites, check=True) as report:
        got = norm(x)
    assert (wanted.stride(), got.stride(), x.stride()) == ((80, 16, 1), (80, 16, 1), (80, 1, 5))
    assert torch.equal(got, wanted)
    assert report.differing == {}


def test_an_empty_list_of_sites_changes_nothing() -> None:
    model = build()
    with swapped(model, []) as report:
        assert_not_swapped(model)
    assert report.differing == {}


def test_a_changed_weight_is_read_at_each_call() -> None:
    model = Weighted(64)
    with swapped(model, sites_of(model)):
        before = model(x_of())
        model.weight.data.mul_(2)
        assert torch.equal(model(x_of()), before * 2)


def test_gradients_flow_through_a_swapped_norm() -> None:
    model = build()
    model(x_of()).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with swapped(model, sites_of(model)):
        model(x_of()).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, wanted[name])


# Put back -------------------------------------------------------------------------------------------------------------


def test_everything_is_put_back_after_an_error() -> None:
    model = build()
    with pytest.raises(ValueError, match="stopped"), swapped(model, sites_of(model)):
        raise ValueError("stopped")
    assert_not_swapped(model)


def test_everything_is_put_back_after_an_interruption() -> None:
    model = build()
    with pytest.raises(KeyboardInterrupt), swapped(model, sites_of(model)):
        raise KeyboardInterrupt
    assert_not_swapped(model)


def test_everything_is_put_back_when_a_site_is_not_in_the_model() -> None:
    model = build()
    sites = sites_of(model)
    stray = Site("layers.7", "", CAST_FIRST, (64,), "float32", "weight")
    with pytest.raises(AttributeError), swapped(model, [*sites, stray]):
        pass
    assert_not_swapped(model)


def test_an_error_inside_the_model_comes_through_and_everything_is_put_back() -> None:
    model = build()
    with pytest.raises(RuntimeError), swapped(model, sites_of(model)):
        model(x_of(torch.float32, 2, 5, 63))
    assert_not_swapped(model)


def test_state_dict_and_flags_are_the_same_while_swapped() -> None:
    model = build()
    names, training = list(model.state_dict()), [module.training for module in model.modules()]
    with swapped(model, sites_of(model)):
        assert list(model.state_dict()) == names
        assert [module.training for module in model.modules()] == training
        assert [name for name, _ in model.named_modules()] == [name for name, _ in build().named_modules()]


# How a norm is called -------------------------------------------------------------------------------------------------


def test_calls_by_name_and_by_position_are_the_same() -> None:
    norm = ZOO["mamba2"]
    model = norm.build()
    x, gate = x_of(), x_of(torch.float32, 2, 5, 64) * 2
    with swapped(model, sites_of(model), check=True) as report, torch.no_grad():
        results = [
            model(x, gate), model(x, gate=gate), model(hidden_states=x, gate=gate), model(gate=gate, hidden_states=x),
        ]  # fmt: skip
        without = [model(x), model(x, None), model(hidden_states=x, gate=None)]
    assert report.differing == {}
    assert all(torch.equal(result, results[0]) for result in results)
    assert all(torch.equal(result, without[0]) for result in without)
    assert not torch.equal(results[0], without[0])


def test_the_signature_stays() -> None:
    model = ZOO["mamba2"].build()
    before = inspect.signature(model.forward)
    with swapped(model, sites_of(model)):
        assert inspect.signature(model.forward) == before
        with pytest.raises(TypeError):
            model(x_of(), gaet=x_of())
        with pytest.raises(TypeError):
            model()


def test_hooks_fire_once_for_each_call() -> None:
    model = build()
    calls: list[str] = []
    model.first.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    model.first.register_forward_hook(lambda module, args, output: calls.append("post"))
    with swapped(model, sites_of(model), check=True):
        model(x_of())
    assert calls == ["pre", "post"] * 2


def test_a_hook_that_changes_the_input_counts() -> None:
    model = build()
    model.first.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    wanted = model(x_of())
    with swapped(model, sites_of(model)):
        assert torch.equal(model(x_of()), wanted)


class WithResidual(Weighted):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalized(x if residual is None else x + residual) * self.weight


def test_a_second_input_that_is_no_gate_takes_the_original_forward_and_says_so() -> None:
    model = randomized(WithResidual(64))
    found = find_norms(model)
    x, residual = x_of(), x_of() * 3
    with torch.no_grad():
        wanted = model(x, residual)
        with swapped(model, found.sites) as report:
            assert torch.equal(model(x), normalized(x) * model.weight)
            assert torch.equal(model(x, None), normalized(x) * model.weight)
            assert report.differing == {}
            assert torch.equal(model(x, residual), wanted)
            assert torch.equal(model(x, residual=residual), wanted)
    assert report.differing == {"": "it is called with residual, which no spec covers"}
    (refusal,) = report.refusals(found)
    assert (refusal.path, refusal.class_name) == ("", found.sites[0].class_name)
    assert refusal.reason == "it is called with residual, which no spec covers"


def test_an_unused_flag_takes_the_original_forward_too() -> None:
    model = randomized(TakesMore(64))
    with swapped(model, sites_of(model)) as report:
        model(x_of(), mask=x_of())
    assert list(report.differing.values()) == ["it is called with mask, which no spec covers"]


# Sites that do not follow their spec in this model --------------------------------------------------------------------


class Widening(nn.Module):
    """A float32 model that calls a norm without a weight in float64, where its eps is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.bare = nn.RMSNorm(64, elementwise_affine=False)
        self.right = nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.bare(self.linear(x).double() * 1e-6).float())


class Narrowing(nn.Module):
    """A T5 norm kept in float32 in a float16 model: it does not cast back, a cast-then-scale norm would."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = hub_class("t5", "T5LayerNorm")(64)
        self.right = Weighted(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.norm(x.half()).half())


@pytest.mark.parametrize(
    ("model_class", "path", "detail"),
    [
        (Widening, "bare", "x (2, 5, 64) torch.float64"),
        (Narrowing, "norm", "x (2, 5, 64) torch.float16, weight torch.float32"),
    ],
)
def test_check_finds_a_site_that_this_model_uses_differently(
    model_class: type[nn.Module], path: str, detail: str
) -> None:
    model = randomized(model_class())
    found = find_norms(model)
    assert [site.path for site in found.sites] == [path, "right"]
    with swapped(model, found.sites) as unchecked:
        model(x_of())
    assert unchecked.differing == {}
    with swapped(model, found.sites, check=True) as report:
        model(x_of())
    assert report.differing == {path: f"as this model calls it ({detail}), it differs from its spec"}
    assert [refusal.path for refusal in report.refusals(found)] == [path]


def test_check_finds_a_single_differing_bit() -> None:
    model = randomized(Weighted(64))
    (site,) = sites_of(model)
    wrong = Site("", site.class_name, site.spec.replace(order="scale_then_cast"), site.width, site.dtype, "weight")
    for dtype, differs in ((torch.float32, False), (torch.bfloat16, True)):
        model.to(dtype)
        with swapped(model, [wrong], check=True) as report:
            model(x_of(dtype))
        assert bool(report.differing) is differs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 3e38])
def test_check_takes_special_values_as_equal(value: float) -> None:
    model = randomized(Weighted(64))
    x = x_of()
    x[0, 0, 0] = value
    x[0, 1] = value
    with swapped(model, sites_of(model), check=True) as report:
        model(x)
    assert report.differing == {}


def test_check_tells_nan_from_zero() -> None:
    model = nn.RMSNorm(64, eps=0.0, elementwise_affine=False)
    (site,) = sites_of(model)
    wrong = Site("", site.class_name, site.spec.replace(eps=1e-30), site.width, site.dtype)
    with swapped(model, [wrong], check=True) as report:
        model(torch.zeros(1, 64))
    assert list(report.differing) == [""]


def test_the_report_names_only_sites_that_differ() -> None:
    with swapped(build(), []) as report:
        pass
    report.differing["b"] = "why"
    found = Recognition([Site("a", "A", BARE, None, "float32"), Site("b", "B", BARE, None, "float32")])
    assert [(r.path, r.class_name, r.reason) for r in report.refusals(found)] == [("b", "B", "why")]


# Captured -------------------------------------------------------------------------------------------------------------


def captured_nodes(model: nn.Module, x: Tensor) -> list[ir.Node]:
    with swapped(model.eval(), sites_of(model)):
        program = capture(model, {next(iter(inspect.signature(model.forward).parameters)): x}, dynamic=False).model
    assert_not_swapped(model)
    return [node for node in program.graph if node.domain == CAPTURE_DOMAIN]


def test_each_call_becomes_one_node_that_carries_its_spec() -> None:
    model = build(torch.float16)
    sites = {site.path: site for site in sites_of(model)}
    calls = []
    for node in captured_nodes(model, x_of(torch.float16)):
        spec = NormSpec.from_json(node.attributes["spec"].as_string())
        path = node.attributes["path"].as_string()
        gated = spec.gate != "none"
        calls.append((path, gated))
        expected = sites[path].spec
        assert spec == (expected if gated else expected.replace(gate="none", activation="none"))
        weight = f"{path}.weight" if spec.has_weight else None
        assert node.op_type == NORM_OP
        inputs = [*node.inputs, None, None, None][:4]  # those at the end that are not there are left out
        assert [value is not None for value in inputs] == [True, spec.has_weight, False, gated]
        assert (inputs[1].name if inputs[1] is not None else None) == weight
        assert node.outputs[0].dtype == ir.DataType.FLOAT16
        assert node.outputs[0].shape == ir.Shape((2, 5, 64))
    assert calls == [
        ("first", False), ("layers.0", False), ("layers.1", False), ("gated", True), ("gated", False),
        ("first", False), ("bare", False), ("layers.0", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"), [("llama", torch.float32), ("olmo2", torch.float16), ("gemma2", torch.float16)]
)
def test_a_wider_weight_gives_the_node_the_dtype_that_the_module_gives(name: str, expected: torch.dtype) -> None:
    model = ZOO[name].build()
    assert model(x_of(torch.float16)).dtype == expected
    (node,) = captured_nodes(model, x_of(torch.float16))
    assert node.outputs[0].dtype == (ir.DataType.FLOAT if expected == torch.float32 else ir.DataType.FLOAT16)


# What a probe cannot see ----------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A model around one norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(64, 64), norm, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.norm(h)) + h


class Special(Weighted):
    """A norm that does something else when x has a certain value, which no probe has."""

    def __init__(self, act: Callable[[Special, Tensor], Tensor | None]) -> None:
        super().__init__(64)
        self.act = act
        self.stats = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(x) * self.weight
        if x.shape[-2:-1] == (19,):  # a length that no probe has
            other = self.act(self, x)
            return y if other is None else other
        return y


def count(module: Special, x: Tensor) -> None:
    module.stats["calls"] += 1


def write(module: Special, x: Tensor) -> None:
    x.data[..., 0] = 0


SPECIAL: dict[str, tuple[Callable[[Special, Tensor], Tensor | None], str]] = {
    "state": (count, "its forward changes the state of the module (stats['calls'])"),
    "in place": (write, "it changes its input in place"),
    "value": (lambda module, x: x * 2, "as this model calls it (x (2, 19, 64) torch.float32, weight torch.float32)"),
    "grad": (lambda module, x: x if torch.is_grad_enabled() else None, "with grad enabled, it differs from its spec"),
    "batch": (lambda module, x: x if x.shape[0] == 5 else None, "with a batch of 5, it differs from its spec"),
    "strides": (lambda module, x: x if not x.is_contiguous() else None, "with a transposed x, it differs"),
    "rank": (lambda module, x: x if x.ndim == 4 else None, "with an x of 4 dims, it differs from its spec"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_only_the_real_input_shows_is_refused_and_the_model_left_as_it_was(name: str) -> None:
    act, reason = SPECIAL[name]
    model = Inner(Special(act)).eval()
    assert [site.path for site in sites_of(model)] == ["norm"]
    with torch.no_grad(), swapped(model, sites_of(model), check=True) as report:
        model(x_of(torch.float32, 2, 19, 64))
    assert list(report.differing) == ["norm"]
    assert reason in report.differing["norm"]
    assert model.norm.stats == {"calls": 0}
    assert_not_swapped(model)


class CastsToWeight(Weighted):
    """Casts to the dtype of its weight where that is a half type, as T5 does."""

    def forward(self, x: Tensor) -> Tensor:
        y = normalized(x)
        return self.weight * (y.to(self.weight.dtype) if self.weight.dtype != torch.float32 else y)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_a_checked_norm_has_the_dtype_and_the_bits_of_the_module_for_every_pair_of_dtypes(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    for make in (CastsToWeight, Weighted):
        model = nn.Sequential(make(64)).to(dtypes[1])
        x = x_of(dtypes[0])
        with torch.no_grad():
            wanted = model(x)
            sites = find_norms(nn.Sequential(make(64))).sites
            with swapped(model, sites, check=True) as report:
                first, second = model(x), model(x)
        assert len(sites) == 1
        assert first.dtype == second.dtype == wanted.dtype
        assert torch.equal(first, wanted)
        assert torch.equal(second, wanted)
        if dtypes[0] == dtypes[1] == torch.float16:
            assert report.differing == {}
        if make is CastsToWeight and dtypes == (torch.float32, torch.float16):
            assert list(report.differing) == ["0"]


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda norm: norm.register_forward_hook(lambda module, args, output: output * 3),
    "forward pre": lambda norm: norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "with kwargs": lambda norm: norm.register_forward_hook(
        lambda module, args, kwargs, output: output - args[0], with_kwargs=True
    ),
    "pre with kwargs": lambda norm: norm.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] * args[0],), kwargs), with_kwargs=True
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_changes_values_is_in_the_exported_file(name: str, tmp_path: Path) -> None:
    model = randomized(Inner(nn.RMSNorm(64, eps=1e-6))).eval()
    with torch.no_grad():
        plain = model(x_of())
        HOOKS[name](model.norm)
        wanted = model(x_of())
    assert not torch.allclose(plain, wanted, atol=1e-2)
    result = export_model(model, tmp_path / "out", target="ort", inputs={"x": x_of()})
    assert [site.path for site in result.recognition.sites] == ["norm"]
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x_of().numpy()})[0]
    assert abs(got - wanted.numpy()).max() < 1e-4


def test_hooks_inside_of_a_norm_and_an_own_call_are_refused() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.drop = nn.Parameter(torch.ones(64)), nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(normalized(x) * self.weight)

    class OwnCallNorm(nn.RMSNorm):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    around = Around()
    assert len(sites_of(around)) == 1
    around.drop.register_forward_hook(lambda module, args, output: output * 2)
    model = nn.ModuleDict({"AroundNorm": around, "own": OwnCallNorm(64)})
    found = find_norms(model)
    assert found.sites == []
    assert [refusal.path for refusal in found.refusals] == ["own"]
    assert "overrides __call__" in found.refusals[0].reason


def test_an_own_call_is_in_the_exported_file(tmp_path: Path) -> None:
    class OwnCallNorm(nn.RMSNorm):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * 2

    model = randomized(Inner(OwnCallNorm(64))).eval()
    with torch.no_grad():
        wanted = model(x_of())
    export_model(model, tmp_path / "out", target="ort", inputs={"x": x_of()})
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x_of().numpy()})[0]
    assert abs(got - wanted.numpy()).max() < 1e-4


def test_a_norm_that_writes_into_its_input_is_found_in_the_graph(tmp_path: Path) -> None:
    class Halving(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            y = normalized(x) * self.weight
            x.mul_(0.5)
            return y

    model = randomized(Inner(Halving(64))).eval()
    with torch.no_grad():
        wanted = model(x_of())
    result = export_model(model, tmp_path / "out", target="ort", inputs={"x": x_of()})
    assert (result.recognition.sites, result.recognition.refusals) == ([], [])
    (site,) = result.manifest["sites"]
    assert (site["path"], site["found"]) == ("norm", "graph")
    assert result.manifest["notes"] == [
        "norm (Halving) found in the graph, because not recognized as a module: it changes its input in place"
    ]
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x_of().numpy()})[0]
    assert abs(got - wanted.numpy()).max() < 1e-4
