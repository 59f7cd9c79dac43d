"""Recognition by behavior: the right spec for every norm, a reason for every look-alike, and no trace left."""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.models.recognition.find_norms import find_norms
from rmsnorm_deploy.models.recognition.site import Recognition, Site
from tests.helpers.norms.look_alikes import LOOK_ALIKES, NamedRMSNorm
from tests.helpers.norms.norm_zoo import (
    BARE,
    CAST_FIRST,
    FLOAT32_EPS,
    FLOAT64_EPS,
    ONE_PLUS,
    TORCH,
    ZOO,
    EvalOnlyDropout,
    Weighted,
    hub_class,
    normalized,
    randomized,
)


def only_site(model: nn.Module, path: str = "") -> Site:
    found = find_norms(model)
    assert found.refusals == []
    assert [site.path for site in found.sites] == [path]
    return found.sites[0]


def specs_by_path(found: Recognition) -> dict[str, Any]:
    assert found.refusals == []
    return {site.path: site.spec for site in found.sites}


# The zoo --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_norm_is_recognized_with_exactly_its_spec(name: str) -> None:
    norm = ZOO[name]
    module = norm.build()
    site = only_site(module)
    assert site.spec == norm.spec
    assert site.width == norm.site_width
    assert (site.weight or "", site.bias or "") == (norm.weight, norm.bias)
    assert site.parameters == [attribute for attribute in (norm.weight, norm.bias) if attribute]
    assert site.dtype == "float32"
    assert site.class_name == f"{type(module).__module__}.{type(module).__qualname__}"


@pytest.mark.parametrize("name", ZOO)
def test_norm_in_a_float64_model(name: str) -> None:
    norm = ZOO[name]
    model = nn.Sequential(norm.make(), nn.Linear(1, 1))  # a norm without tensors has the model's dtype
    found = find_norms(randomized(model).double())
    if norm.float64 == "refused":
        assert found.sites == []
        assert ["in its own float64" in refusal.reason for refusal in found.refusals] == [True]
        return
    eps = FLOAT64_EPS if norm.float64 == "eps" else norm.spec.eps
    assert specs_by_path(found) == {"0": norm.spec.replace(eps=eps)}
    assert found.sites[0].dtype == "float64"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["torch_eps_none", "llama", "olmo2", "gemma2", "muse_spark", "no_upcast", "qwen3_next"]
)
def test_norm_in_half_precision_has_the_same_spec(name: str, dtype: torch.dtype) -> None:
    norm = ZOO[name]
    site = only_site(norm.build(dtype))
    assert site.spec == norm.spec
    assert site.dtype == str(dtype).removeprefix("torch.")


def test_norm_without_tensors_has_the_dtype_of_its_model() -> None:
    model = nn.Sequential(ZOO["nanochat"].make(), nn.Linear(4, 4)).half()
    assert only_site(model, "0").dtype == "float16"


@pytest.mark.parametrize("value", [1.0, 0.0, -0.5])
@pytest.mark.parametrize(
    "name", ["torch", "llama", "olmo2", "gemma2", "muse_spark", "biased", "mamba2", "per_head_weight"]
)
def test_weights_of_one_value_do_not_hide_the_formula(name: str, value: float) -> None:
    norm = ZOO[name]
    module = norm.build()
    for parameter in module.parameters():
        nn.init.constant_(parameter, value)
    site = only_site(module)
    assert site.spec == norm.spec
    assert site.weight == norm.weight


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8, 3e-6, 1.25e-5, 1.19e-7, 2.5e-4, 1e-12])
def test_eps_is_measured_even_where_it_is_stated_nowhere(eps: float) -> None:
    class Hidden(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return normalized(x, eps) * self.weight

    assert only_site(randomized(Hidden(64))).spec == CAST_FIRST.replace(eps=eps)


def test_an_eps_that_no_short_number_gives_is_refused_rather_than_rounded() -> None:
    class Odd(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return normalized(x, 1.234567e-6) * self.weight

    found = find_norms(Odd(64))
    assert found.sites == []
    assert "no NormSpec" in found.refusals[0].reason


def test_an_odd_eps_that_the_module_states_is_found() -> None:
    assert only_site(nn.RMSNorm(64, eps=1.234567e-6)).spec == TORCH.replace(eps=1.234567e-6)


@pytest.mark.parametrize("width", [3, 48, 4096, 8192])
def test_width_does_not_matter(width: int) -> None:
    site = only_site(randomized(Weighted(width)))
    assert (site.spec, site.width) == (CAST_FIRST, (width,))


# Look-alikes ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alike_is_refused_with_the_reason_or_passed_over(name: str) -> None:
    expected = LOOK_ALIKES[name].refused
    found = find_norms(LOOK_ALIKES[name].make())
    assert found.sites == []
    if not expected:
        assert found.refusals == []
        return
    (refusal,) = found.refusals
    assert expected in refusal.reason
    assert refusal.path == ""
    assert "\n" not in refusal.reason
    assert refusal.to_dict() == {"path": "", "class": refusal.class_name, "reason": refusal.reason}


@pytest.mark.parametrize(
    "name", ["eps_outside", "normalize", "variance_only", "double_statistics", "layer_norm_subclass"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_look_alike_is_refused_in_other_dtypes_too(name: str, dtype: torch.dtype) -> None:
    found = find_norms(LOOK_ALIKES[name].make().to(dtype))
    assert found.sites == []
    assert len(found.refusals) == 1


def test_an_optional_input_that_is_no_gate_leaves_the_plain_norm() -> None:
    class Residual(Weighted):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            return normalized(x if residual is None else x + residual) * self.weight

    class ResidualTuple(Weighted):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
            return normalized(x) * self.weight if residual is None else (normalized(x + residual) * self.weight, x)

    assert only_site(Residual(64)).spec == CAST_FIRST
    assert only_site(ResidualTuple(64)).spec == CAST_FIRST


def test_a_compiled_or_traced_norm_is_judged_by_what_it_does() -> None:
    assert only_site(torch.fx.symbolic_trace(nn.RMSNorm(64, eps=1e-6))).spec == TORCH


# Where norms stand ----------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Subclass(nn.RMSNorm):
    pass


def test_a_wrapped_norm_is_found_inside_the_wrapper() -> None:
    assert only_site(Wrapper(Wrapper(nn.RMSNorm(64, eps=1e-6))), "norm.norm").spec == TORCH


def test_a_wrapper_without_any_parameter_is_one_norm_and_not_two() -> None:
    bare = ZOO["nanochat"].make()
    assert only_site(Wrapper(Wrapper(bare)), "").spec == BARE
    assert only_site(nn.Sequential(Wrapper(bare), nn.Linear(2, 2)), "0").spec == BARE


def test_a_subclass_is_a_norm_like_its_base() -> None:
    assert only_site(Subclass(64, eps=1e-6)).spec == TORCH


def test_norms_in_lists_are_listed_in_module_order() -> None:
    model = nn.ModuleDict({
        "layers": nn.ModuleList([nn.RMSNorm(8, eps=1e-5), Weighted(8), nn.Linear(8, 8)]),
        "last": nn.RMSNorm(8, eps=1e-6),
    })  # fmt: skip
    assert specs_by_path(find_norms(model)) == {
        "layers.0": TORCH.replace(eps=1e-5),
        "layers.1": CAST_FIRST,
        "last": TORCH,
    }
    assert [site.path for site in find_norms(model).sites] == ["layers.0", "layers.1", "last"]


def test_a_module_under_two_paths_is_listed_once_under_its_first() -> None:
    norm = nn.RMSNorm(8, eps=1e-6)
    assert specs_by_path(find_norms(nn.ModuleList([norm, Wrapper(norm)]))) == {"0": TORCH}


def test_norms_with_one_tied_weight_are_both_sites() -> None:
    model = nn.ModuleList([Weighted(8), nn.RMSNorm(8, eps=1e-6)])
    model[1].weight = model[0].weight
    assert specs_by_path(find_norms(model)) == {"0": CAST_FIRST, "1": TORCH}
    assert model[1].weight is model[0].weight


def test_norms_of_a_whole_model_beside_other_norms() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Weighted(8), nn.Sequential(nn.RMSNorm(8), nn.Dropout(0.1)))
    found = find_norms(model)
    assert {site.path: site.spec for site in found.sites} == {"2": CAST_FIRST, "3.0": TORCH.replace(eps=FLOAT32_EPS)}
    assert [refusal.path for refusal in found.refusals] == ["1"]
    assert found.site("3.0").parameters == ["3.0.weight"]
    with pytest.raises(KeyError):
        found.site("1")


def test_the_dict_of_a_site_is_the_json_interface() -> None:
    site = find_norms(nn.Sequential(nn.RMSNorm((4, 8), eps=1e-6), Weighted(8), ZOO["nanochat"].make())).sites
    assert [row.to_dict()["width"] for row in site] == [[4, 8], 8, None]
    assert site[1].to_dict() == {
        "path": "1",
        "class": "tests.helpers.norms.norm_zoo.Weighted",
        "spec": CAST_FIRST.to_dict(),
        "width": 8,
        "dtype": "float32",
        "parameters": ["1.weight"],
    }


def test_a_model_without_norms_has_no_sites_and_no_refusals() -> None:
    found = find_norms(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Embedding(3, 4), nn.Conv1d(4, 4, 1)))
    assert (found.sites, found.refusals) == ([], [])


# No trace -------------------------------------------------------------------------------------------------------------


class Counting(Weighted):
    """Changes everything that a forward can change without being asked to."""

    def __init__(self) -> None:
        super().__init__(32)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("peak", torch.zeros(()))
        self.plain = torch.zeros(2)
        self.number = 0
        self.log: list[Any] = []
        self.table: dict[str, Any] = {"shapes": [], "nested": {"calls": [0]}}
        self.tally: defaultdict[str, int] = defaultdict(int)
        self.recent: deque[int] = deque(maxlen=3)
        self.array = np.zeros(2)
        self.child = nn.Identity()
        self.child.seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.peak.copy_(x.abs().max())
        self.plain.add_(1)
        self.number += 1
        self.log.append(x.shape)
        self.table["shapes"].append(x.dtype)
        self.table["nested"]["calls"][0] += 1
        self.tally["calls"] += 1
        self.recent.append(1)
        self.array += 1
        self.child.seen.append(1)
        random.random()
        np.random.rand()
        torch.rand(1)
        return self.child(normalized(x) * self.weight)


def tensor_bits(model: nn.Module) -> dict[str, bytes]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in named.items()}


def test_a_forward_that_keeps_state_changes_only_copies() -> None:
    module = Counting()
    before = tensor_bits(module)
    found = find_norms(module)
    assert found.sites == []
    assert found.refusals[0].reason == "its forward changes the state of the module (number)"
    assert tensor_bits(module) == before
    assert module.plain.tolist() == [0.0, 0.0]
    assert (module.number, module.log, module.array.tolist()) == (0, [], [0.0, 0.0])
    assert module.table == {"shapes": [], "nested": {"calls": [0]}}
    assert (dict(module.tally), list(module.recent), module.child.seen) == ({}, [], [])


def test_a_forward_that_changes_its_weight_in_place_changes_only_a_copy() -> None:
    class Clamping(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.5, 0.5)
            return normalized(x) * self.weight

    module = Clamping(64)
    assert find_norms(module).refusals[0].reason == "its forward changes the state of the module (weight)"
    assert module.weight.tolist() == [1.0] * 64


def everything() -> nn.Module:
    """Sites, refusals, tied weights, frozen and trained parameters, buffers, both training flags."""
    model = nn.ModuleDict({
        "torch": nn.RMSNorm(32),
        "hand": Weighted(32),
        "counting": Counting(),
        "dropout": EvalOnlyDropout(),
        "buffer": ZOO["buffer_weight"].make(),
        "gated": ZOO["silu_after_bare"].make(),
        "refused": NamedRMSNorm(32),
        "batch": nn.BatchNorm1d(4),
        "linear": nn.Linear(4, 4),
    })  # fmt: skip
    randomized(model, 3)
    model["hand"].weight.requires_grad_(False)
    model["torch"].weight.grad = torch.ones(32)
    model["hand"].eval()
    return model


def test_recognition_leaves_a_model_exactly_as_it_was() -> None:
    model = everything()
    modules = dict(model.named_modules())
    bits = tensor_bits(model)
    identities = {name: (id(t), t.data_ptr(), t._version) for name, t in model.named_parameters()}
    flags = {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()}
    training = {name: module.training for name, module in modules.items()}
    keys = {name: list(vars(module)) for name, module in modules.items()}
    classes = {name: type(module) for name, module in modules.items()}

    found = find_norms(model)

    assert [site.path for site in found.sites] == ["torch", "hand", "dropout", "buffer", "gated"]
    assert dict(model.named_modules()) == modules
    assert tensor_bits(model) == bits
    assert {name: (id(t), t.data_ptr(), t._version) for name, t in model.named_parameters()} == identities
    assert {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()} == flags
    assert {name: module.training for name, module in modules.items()} == training
    assert {name: list(vars(module)) for name, module in modules.items()} == keys
    assert {name: type(module) for name, module in modules.items()} == classes


def test_recognition_leaves_every_random_state_as_it_was() -> None:
    states: list[Callable[[], Any]] = [
        lambda: torch.get_rng_state().tolist(),
        random.getstate,
        lambda: [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
    ]
    before = [state() for state in states]
    assert len(find_norms(nn.ModuleList([Counting(), EvalOnlyDropout(), NamedRMSNorm(8)])).sites) == 1
    assert [state() for state in states] == before


@pytest.mark.parametrize("name", ["random", "always_dropping", "torch"])
def test_recognition_does_not_depend_on_the_random_state(name: str) -> None:
    found = []
    for seed in range(6):
        module = LOOK_ALIKES[name].make() if name in LOOK_ALIKES else ZOO[name].build()
        for set_seed in (torch.manual_seed, random.seed, np.random.seed):
            set_seed(seed)
        found.append(find_norms(module))
    assert all(one == found[0] for one in found)


def test_recognition_leaves_the_modes_of_torch_as_they_were() -> None:
    modes: list[Callable[[], Any]] = [
        torch.is_grad_enabled, torch.get_num_threads, torch.get_default_dtype, torch.is_inference_mode_enabled,
        lambda: torch.is_autocast_enabled("cpu"),
    ]  # fmt: skip
    before = [mode() for mode in modes]
    find_norms(everything())
    assert [mode() for mode in modes] == before


HOOKS: list[Callable[[nn.Module, Callable[..., None]], Any]] = [
    lambda module, hook: module.register_forward_hook(hook),
    lambda module, hook: module.register_forward_hook(hook, always_call=True),
    lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    lambda module, hook: module.register_forward_pre_hook(hook),
    lambda module, hook: module.register_full_backward_hook(hook),
]


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_stay_and_never_fire(register: Callable[[nn.Module, Callable[..., None]], Any]) -> None:
    fired: list[int] = []
    model = nn.ModuleDict({"norm": nn.RMSNorm(32), "counting": Counting(), "refused": NamedRMSNorm(32)})
    for module in model.modules():
        register(module, lambda *args: fired.append(1))
    before = {name: copy.copy(vars(module)) for name, module in model.named_modules()}
    assert [site.path for site in find_norms(model).sites] == ["norm"]
    assert fired == []
    for name, module in model.named_modules():
        for attribute in (key for key in vars(module) if "hook" in key):
            assert vars(module)[attribute] is before[name][attribute]
    if register is not HOOKS[-1]:
        model["norm"](torch.ones(1, 32))
        assert fired == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = nn.ModuleList([nn.RMSNorm(32, eps=1e-6, dtype=torch.float32), ZOO["nanochat"].make()])
        assert specs_by_path(find_norms(model)) == {"0": TORCH, "1": BARE}
    finally:
        torch.set_default_dtype(before)


def test_modes_that_the_caller_is_in_do_not_matter() -> None:
    model = nn.ModuleList([nn.RMSNorm(32, eps=1e-6), Weighted(32)])
    with torch.inference_mode():
        assert specs_by_path(find_norms(model)) == {"0": TORCH, "1": CAST_FIRST}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert specs_by_path(find_norms(model)) == {"0": TORCH, "1": CAST_FIRST}
    with torch.device("meta"):
        assert specs_by_path(find_norms(model)) == {"0": TORCH, "1": CAST_FIRST}


def test_recognition_does_not_depend_on_the_training_mode() -> None:
    for training in (True, False):
        assert only_site(EvalOnlyDropout().train(training)).spec == CAST_FIRST


def test_a_transformers_model_has_exactly_its_norms() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    norms = {path for path, module in model.named_modules() if isinstance(module, hub_class("gemma2", "Gemma2RMSNorm"))}
    assert specs_by_path(find_norms(model)) == dict.fromkeys(norms, ONE_PLUS)
    assert len(norms) == 5
