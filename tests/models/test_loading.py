"""Every way to name a model, and every way to name none."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.dtypes import NORM_DTYPES
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.loading import BUILTINS, LoadedModel, as_loaded, load_model
from rmsnorm_deploy.models.recognition.find_norms import find_norms

CODE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Config:
    width: int = 4

class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(Config().width, 4), nn.RMSNorm(4), nn.Dropout(0.5))

ready = Model()
number = 3

def model():
    return Model()

def with_inputs():
    return Model(), {"x": torch.ones(2, 4), "ids": torch.ones(2, dtype=torch.int64), "n": 7}

def failing():
    raise ValueError("no such width")

def leaving():
    raise SystemExit(3)

def needing(width):
    return Model()

def listed():
    return Model(), [torch.ones(2, 4)]

def three():
    return Model(), {}, {}

def nothing():
    return None
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of Python code in the working folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    path = tmp_path / "my_norm_model.py"
    path.write_text(CODE)
    yield path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith((str(tmp_path), "my_norm_model", "json", "this")):
            del sys.modules[name]


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def assert_usage_error(source: str, message: str, **options: Any) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        load_model(source, **options)
    assert raised.value.exit_code == 2


# Built-in -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTINS)
def test_builtin_models_load_in_eval_mode(name: str) -> None:
    loaded = load_model(f"builtin:{name}")
    assert (loaded.kind, loaded.source, loaded.folder) == ("decoder", f"builtin:{name}", None)
    assert loaded.task == ("addition" if name == "addition" else None)
    assert not any(module.training for module in loaded.model.modules())
    assert len(find_norms(loaded.model).sites) >= 3


@pytest.mark.parametrize("dtype", NORM_DTYPES)
def test_a_builtin_in_every_dtype(dtype: str) -> None:
    assert dtypes(load_model("builtin:small", dtype=dtype).model) == {getattr(torch, dtype)}


def test_an_unknown_builtin_names_those_there_are() -> None:
    assert_usage_error("builtin:huge", "unknown built-in model 'huge'; expected one of builtin:addition, builtin:small")


@pytest.mark.parametrize("source", ["builtin:small", "nothing/here", "/no/such/folder"])
def test_an_unknown_dtype_is_an_error_before_anything_is_loaded(source: str) -> None:
    assert_usage_error(source, "dtype: expected one of float32, float16, .*got 'float8'", dtype="float8")


# Python ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["model", "Model", "ready"])
@pytest.mark.parametrize("name", ["my_norm_model.py", "my_norm_model"])
def test_a_factory_a_class_or_a_module_in_python(code: Path, name: str, attribute: str) -> None:
    loaded = load_model(f"{name}:{attribute}")
    assert (loaded.kind, loaded.folder, loaded.task, loaded.example_inputs) == ("python", None, None, None)
    assert [site.path for site in find_norms(loaded.model).sites] == ["1"]
    assert not any(module.training for module in loaded.model.modules())
    assert type(loaded.model).__module__ == "my_norm_model"


def test_a_factory_by_absolute_path(code: Path) -> None:
    assert isinstance(load_model(f"{code}:model").model[1], nn.RMSNorm)


def test_example_inputs_of_a_factory_follow_the_dtype(code: Path) -> None:
    loaded = load_model("my_norm_model.py:with_inputs", dtype="float16")
    assert dtypes(loaded.model) == {torch.float16}
    inputs = dict(loaded.example_inputs or {})
    assert inputs["x"].dtype == torch.float16
    assert inputs["ids"].dtype == torch.int64
    assert inputs["n"] == 7
    assert loaded.model(inputs["x"]).shape == (2, 4)
    kept = load_model("my_norm_model.py:with_inputs")
    assert dict(kept.example_inputs or {})["x"].dtype == torch.float32


@pytest.mark.parametrize("dtype", NORM_DTYPES)
def test_a_python_model_in_every_dtype(code: Path, dtype: str) -> None:
    assert dtypes(load_model("my_norm_model.py:model", dtype=dtype).model) == {getattr(torch, dtype)}


@pytest.mark.parametrize("stem", ["json", "this"])
def test_a_file_named_as_a_module_of_python_hides_nothing(code: Path, stem: str) -> None:
    known = sys.modules.get(stem)
    (code.parent / f"{stem}.py").write_text(CODE)
    assert isinstance(load_model(f"{stem}.py:model").model[1], nn.RMSNorm)
    assert sys.modules.get(stem) is known
    assert json.loads("[1]") == [1]


def test_a_file_can_be_loaded_again_after_it_changed(code: Path) -> None:
    first = load_model("my_norm_model.py:model").model
    code.write_text(CODE.replace("nn.RMSNorm(4)", "nn.RMSNorm(4, eps=0.25)"))
    second = load_model("my_norm_model.py:model").model
    assert [find_norms(model).sites[0].spec.eps for model in (first, second)] == [2.0**-23, 0.25]


def test_a_file_that_fails_leaves_no_module_behind(code: Path) -> None:
    (code.parent / "half_way.py").write_text("a = 1\nraise ValueError('stopped')\n")
    assert_usage_error("half_way.py:model", "importing 'half_way.py' failed: ValueError: stopped")
    assert "half_way" not in sys.modules


PYTHON_ERRORS = {
    "my_norm_model.py:absent": "the module 'my_norm_model.py' has no attribute 'absent'",
    "my_norm_model.py:": "has no attribute ''",
    "my_norm_model.py:failing": r"calling failing\(\) failed: ValueError: no such width",
    "my_norm_model.py:leaving": r"calling leaving\(\) failed: SystemExit: 3",
    "my_norm_model.py:needing": r"calling needing\(\) failed: TypeError: .*width",
    "my_norm_model.py:number": r"calling number\(\) failed: TypeError",
    "my_norm_model.py:three": r"expected three\(\) to return .*, got a tuple of Model, dict, dict",
    "my_norm_model.py:nothing": r"expected nothing\(\) to return .*, got NoneType",
    "absent.py:model": "the file absent.py does not exist",
    "absent_package.sub:model": "importing 'absent_package.sub' failed: ModuleNotFoundError",
    "broken.py:model": "importing 'broken.py' failed: ModuleNotFoundError: No module named 'absent_package'",
    "syntax.py:model": "importing 'syntax.py' failed: SyntaxError",
    "script.py:model": "importing 'script.py' failed: SystemExit: 5",
    ":model": "importing '' failed",
}


@pytest.mark.parametrize("source", PYTHON_ERRORS)
def test_python_that_gives_no_model(code: Path, source: str) -> None:
    (code.parent / "broken.py").write_text("import absent_package\n")
    (code.parent / "syntax.py").write_text("def (\n")
    (code.parent / "script.py").write_text("raise SystemExit(5)\n")
    assert_usage_error(source, PYTHON_ERRORS[source])


# Folders and names ----------------------------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


MANIFEST = '{"schema": "rmsnorm_deploy.manifest/2"}'
LLAMA_CONFIG = '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
FOLDER_ERRORS: dict[str, tuple[dict[str, str | bytes], str]] = {
    "empty": ({}, "has no config.json, so it is not a saved model. Save one with save_pretrained"),
    "exported": ({"manifest.json": MANIFEST, "model.onnx": "x"}, "is an exported folder, not a PyTorch model"),
    "exported_with_config": (
        {"manifest.json": MANIFEST, "model.onnx": "x", "config.json": LLAMA_CONFIG},
        "is an exported folder, not a PyTorch model",
    ),
    "bad_json": ({"config.json": "{"}, "config.json cannot be read as JSON"),
    "no_text": ({"config.json": b"\xff\xfe\x00"}, "config.json cannot be read as JSON"),
    "list": ({"config.json": "[]"}, "config.json: expected an object with a model's config, got list"),
    "decoder_without_weights": ({"config.json": '{"format": "rmsnorm_deploy.decoder"}'}, "no file model.safetensors"),
    "unknown_type": ({"config.json": '{"model_type": "nothing_such"}'}, "could not be loaded by transformers"),
    "no_type": ({"config.json": "{}"}, "could not be loaded by transformers"),
    "no_weights": ({"config.json": LLAMA_CONFIG}, "could not be loaded by transformers"),
    "broken_weights": ({"config.json": LLAMA_CONFIG, "model.safetensors": "x"}, "is not a complete safetensors file"),
}


@pytest.mark.parametrize("name", FOLDER_ERRORS)
def test_a_folder_that_holds_no_model(name: str, tmp_path: Path) -> None:
    files, message = FOLDER_ERRORS[name]
    folder = write(tmp_path / name, files)
    assert_usage_error(str(folder), message)
    assert {path.name for path in folder.iterdir()} == set(files)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"x")
    assert_usage_error(str(path), "is a file. Give a folder .* rmsnorm validate model.onnx --against MODEL")


@pytest.mark.parametrize(
    "source", ["./absent", "/no/such/folder", "~/no such folder", "../absent", "three/parts/deep", ""]
)
def test_a_folder_that_is_not_there(source: str) -> None:
    assert_usage_error(source, "is neither an existing folder nor a hub name")


def test_a_name_too_long_for_a_file_system() -> None:
    assert_usage_error("a" * 300, "cannot be opened")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [None, *NORM_DTYPES])
def test_a_saved_transformers_model_loads_in_the_dtype_asked_for(llama: Path, dtype: str | None) -> None:
    loaded = load_model(str(llama), dtype=dtype)
    assert (loaded.kind, loaded.folder, loaded.task) == ("transformers", llama, None)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert dtypes(loaded.model) == {getattr(torch, dtype or "bfloat16")}
    assert not loaded.model.training
    sites = find_norms(loaded.model).sites
    assert [site.path for site in sites] == [
        "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm",
    ]  # fmt: skip
    assert {site.dtype for site in sites} == {dtype or "bfloat16"}


def test_a_folder_without_architectures_loads_as_the_nearest_class(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    del config["architectures"]
    files = {"config.json": json.dumps(config), "model.safetensors": (llama / "model.safetensors").read_bytes()}
    loaded = load_model(str(write(tmp_path / "model", files)))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


def test_a_checkpoint_beside_an_exported_file_is_still_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in llama.iterdir()}
    folder = write(tmp_path / "model", {**files, "manifest.json": MANIFEST})
    assert load_model(str(folder)).kind == "transformers"


def test_code_that_comes_with_a_checkpoint_is_not_run_unless_asked(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    witness = tmp_path / "it_ran"
    files = {"config.json": json.dumps(config), "own.py": f"open({str(witness)!r}, 'w')\n"}
    assert_usage_error(str(write(tmp_path / "model", files)), "trust_remote_code|could not be loaded")
    assert not witness.exists()


def test_a_decoder_folder_loads(tmp_path: Path) -> None:
    from rmsnorm_deploy.models.builtin.checkpoint import save_decoder
    from rmsnorm_deploy.models.builtin.decoder import small_decoder

    model = small_decoder()
    save_decoder(model, tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), dtype="float16")
    assert (loaded.kind, loaded.folder, loaded.task) == ("decoder", tmp_path / "model", None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor.half())


@pytest.mark.parametrize("name", ["owner/no-such-model", "no-such-model"])
def test_a_hub_name_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read from the environment at import only
    assert_usage_error(
        name, f"the hub name '{name}': offline: expected config.json in the cache .*got none; download it"
    )


def test_without_transformers_the_error_says_how_to_get_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmsnorm_deploy.models.errors import EnvironmentMissingError

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentMissingError, match=r'pip install "rmsnorm-deploy\[hf\]"') as raised:
        load_model(str(llama))
    assert raised.value.exit_code == 4


def test_what_is_loaded_says_where_it_came_from(llama: Path) -> None:
    loaded = load_model(str(llama))
    assert isinstance(loaded, LoadedModel)
    assert (loaded.source, loaded.notes, loaded.example_inputs) == (str(llama), [], None)


def exported_program(tmp_path: Path) -> str:
    """A factory that returns the module of an ExportedProgram."""
    path = tmp_path / "program.py"
    path.write_text(
        "import torch\n"
        "def made():\n"
        "    return torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),)).module()\n"
    )
    return f"{path}:made"


def test_the_module_of_an_exported_program_is_refused(tmp_path: Path) -> None:
    """Its mode is fixed, so it is neither evaluated nor swapped."""
    with pytest.raises(UsageError, match=r"cannot be put in eval mode .*ExportedProgram\. Give the original module"):
        load_model(exported_program(tmp_path))
    module = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),)).module()
    with pytest.raises(UsageError, match="Give the original module"):
        as_loaded(module)


def test_the_check_of_the_mode_changes_nothing() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    as_loaded(model)
    assert [module.training for module in model.modules()] == [True, True, False]
