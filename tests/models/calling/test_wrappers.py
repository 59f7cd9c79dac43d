from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rmsnorm_deploy.export.from_torch.export_model import export_model
from rmsnorm_deploy.models.calling.wrappers import WRAPPERS, look_through
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.models.loading import as_loaded
from rmsnorm_deploy.models.recognition.find_norms import find_norms


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 64), nn.RMSNorm(64)).eval()


X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


def ddp(module: nn.Module) -> nn.Module:
    """A wrapper as in training, without a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = module
    return wrapper


class PeftModel(nn.Module):
    """Takes the place of peft's class: the adapters are in the model that `base_model.model` holds."""

    def __init__(self, module: nn.Module, prompts: bool = False) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = module
        self.peft_config = {"default": type("Config", (), {"is_prompt_learning": prompts})()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)


PeftModel.__module__ = "peft.peft_model"
MAKERS = {
    "torch.nn.DataParallel": nn.DataParallel,
    "DistributedDataParallel": ddp,
    "torch.compile": torch.compile,
    "torch.optim.swa_utils.AveragedModel": torch.optim.swa_utils.AveragedModel,
    "PeftModel, with its adapters as they are": PeftModel,
}


@pytest.mark.parametrize("label", MAKERS)
def test_a_wrapper_is_looked_through(label: str) -> None:
    model = small()
    found = look_through(MAKERS[label](model))
    assert found.notes == [f"took the module inside {label}"]
    assert [site.path for site in find_norms(found.model).sites] == ["1", "3"]
    assert torch.equal(found.model(X), model(X))


def test_every_wrapper_has_a_test_or_needs_a_package() -> None:
    labels = {label for label, _ in WRAPPERS.values()}
    assert labels - set(MAKERS) == {"the engine of DeepSpeed", "FullyShardedDataParallel"}


def test_wrappers_inside_are_looked_through_and_the_given_model_is_not_changed() -> None:
    model = small()
    wanted = model(X)
    model[1] = torch.compile(model[1])
    model[2].compile()
    before = list(model.named_modules())
    found = look_through(nn.DataParallel(model))
    assert found.notes == [
        "took the module inside torch.nn.DataParallel",
        "took the modules inside torch.compile (2: 1, 2)",
    ]
    assert [site.path for site in find_norms(found.model).sites] == ["1", "3"]
    assert torch.equal(found.model(X), wanted)
    assert list(model.named_modules()) == before
    assert found.model[0].weight is model[0].weight
    assert found.model[2]._compiled_call_impl is None
    assert model[2]._compiled_call_impl is not None


def test_a_compiled_forward_is_taken_off() -> None:
    model = small()
    model[1].forward = torch.compile(model[1].forward)  # type: ignore[method-assign]
    found = look_through(model)
    assert found.notes == ["took the modules inside torch.compile (1: 1)"]
    assert "forward" not in vars(found.model[1])
    assert "forward" in vars(model[1])


class AlignDevicesHook:
    """Takes the place of accelerate's hook, which is known by its name."""


def hook(module: nn.Module, attached: Any) -> None:
    """What accelerate's `add_hook_to_module` does."""
    old = module.forward

    def new_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return module._old_forward(*args, **kwargs)

    module._hf_hook, module._old_forward = attached, old
    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)  # type: ignore[method-assign]


def test_hooks_of_accelerate_that_move_tensors_are_taken_off() -> None:
    model = small()
    wanted = model(X)
    for module in list(model.modules()):
        hook(module, AlignDevicesHook())
    found = look_through(model)
    assert found.notes == ["took the modules inside the hooks of accelerate (5: 0, 1, 2, ...)"]
    assert len(find_norms(found.model).sites) == 2
    assert torch.equal(found.model(X), wanted)
    assert "_hf_hook" in vars(model[1])


def test_other_hooks_of_accelerate_stay_and_offloaded_weights_are_refused() -> None:
    model = small()
    hook(model[1], object())
    assert look_through(model).model is model
    away = small()
    hook(away[1], AlignDevicesHook())
    away[1].to("meta")
    with pytest.raises(UsageError, match=r"RMSNorm holds parameters that accelerate offloaded .* device_map=\"cpu\""):
        look_through(away)


def test_models_without_wrappers_are_the_same_object() -> None:
    model = small()
    found = look_through(model)
    assert found.model is model
    assert found.notes == []
    prompts = PeftModel(model, prompts=True)
    assert look_through(prompts).model is prompts


def test_what_cannot_be_looked_through_is_refused() -> None:
    wrapper = nn.DataParallel(small())
    wrapper.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UsageError, match=r"DataParallel has forward hooks, which the module inside of it would lose"):
        look_through(wrapper)
    program = torch.export.export(small(), (X,))
    with pytest.raises(UsageError, match=r"got an ExportedProgram, .* passed to torch\.export\.export"):
        as_loaded(program)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected a PyTorch module, or the name or folder of a model, got int"):
        as_loaded(3)  # type: ignore[arg-type]


def test_scripted_modules_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"the model is a TorchScript module .* Give the module that it was made"
    ):
        export_model(torch.jit.trace(small(), X), tmp_path / "out", inputs=X)
