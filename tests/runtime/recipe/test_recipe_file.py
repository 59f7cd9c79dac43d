"""Recipes: what is read, and every mistake with its line, column, key and reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.recipe.recipe_file import parse_recipe, read_recipe

_HUB = '[[model]]\nname = "a"\nsource = "owner/name"\n'
_ONNX = '[[model]]\nname = "a"\nsource = "net.onnx"\n'
_MODEL = '[[model]]\nname = "a"\nsource = "builtin:small"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "models.py").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"is_encoder_decoder": true}')
    (tmp_path / "inputs.npz").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"")
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / "net.onnx").write_bytes(b"")
    return tmp_path / "rmsnorm.toml"


# Each text, and the beginning of the message after the file's name.
_MISTAKES = {
    "no value": ("output = \n", "1:10: expected TOML, got: invalid value."),
    "no end": ('output = "', "1:11: expected TOML, got: unterminated string."),
    "twice": ("output = 'a'\noutput = 'b'\n", "2:13: expected TOML, got: cannot overwrite a value."),
    "empty": ("", "1:1: model: expected at least one [[model]], got none."),
    "no models": ("model = []\n", "1:1: model: expected at least one [[model]], got none."),
    "one table": ('[model]\nname = "a"\n', "1:1: model: expected [[model]], of which there may be several"),
    "a mark before it": ("\ufeffopst = 1\n" + _MODEL, "1:1: opst: unknown key"),
    "no table of limits": (_MODEL + "limits = 1\n", "4:1: limits: expected a table, got 1."),
    "NUL in the output": (
        "output = 'a\\u0000'\n".replace("'", '"') + _MODEL.replace("builtin:small", "folder"),
        "1:1: output: expected a path",
    ),
    "NUL in a source": (_MODEL.replace("builtin:small", "a\\u0000"), "3:1: source: expected an existing folder"),
    "unknown home": (_MODEL.replace("builtin:small", "~nobody/a"), "3:1: source: expected an existing folder"),
    "unknown home of inputs": (_MODEL + "inputs = '~nobody/a.npz'\n", "4:1: inputs: expected a file, got none at"),
    "a long path": (_MODEL + f"inputs = '{'a' * 5000}.npz'\n", "4:1: inputs: expected a file, got none at"),
    "no file to compare": (
        _ONNX.replace("net.onnx", "none.onnx") + "against = 'models.py:net'\n",
        "3:1: source: expected an existing folder",
    ),
    "no tokenizer": (
        _MODEL + "prompts = ['a']\ntokenizer = 'models.py:net'\n",
        "5:1: tokenizer: expected an existing folder with",
    ),
    "a tokenizer without prompts": (_MODEL + "tokenizer = 'owner/name'\n", "4:1: tokenizer: expected prompts, without"),
    "a file among the results": (
        "output = ''\n" + _ONNX.replace("net.onnx", "a/model/net.onnx"),
        "4:1: source: expected a place outside of the results, got 'a/model/net.onnx', which is in ",
    ),
    "results in what it is compared with": (
        "output = 'folder'\n" + _ONNX + "against = 'folder'\n",
        "5:1: against: expected a folder without the results, got 'folder', which holds ",
    ),
    "a share above 1": (
        _MODEL + "limits = {logits = {min_top1 = 2}}\n",
        "4:21: min_top1: expected a number from 0 to 1, got 2.",
    ),
    "limits of no part": (
        _MODEL + "limits = {'@norm' = {max_rms = 1}}\n",
        "4:11: @norm: expected the name of an output, @norms or @segments, got '@norm'.",
    ),
    "no profile": (_MODEL + "build = ['rtx']\nprofiles = ['x']\n", "5:13: profiles[0]: expected numbers separated"),
    "order of a profile": (
        _MODEL + "build = ['rtx']\nprofiles = ['a:1,2,3', 'a:1x3,1x2,1x4']\n",
        "5:24: profiles[1]: expected smallest <= usual <= largest, none negative, got 3,2,4.",
    ),
    "huge workspace": (_MODEL + f"build = ['rtx']\nworkspace = {10**20}\n", "5:1: workspace: expected at most 87960"),
    "default of some": (
        "[defaults]\nbuild = ['rtx']\nrunners = ['rtx']\n" + _MODEL + _MODEL.replace('"a"', '"b"') + "build = []\n",
        "3:1: runners: for the model 'b': expected build = [\"rtx\"] for the runner rtx, got none.",
    ),
    "numbers": ("model = [1]\n", "1:10: [[model]] 1: expected a table, got 1."),
    "unknown key": (
        _MODEL + "with_pst = true\n",
        "4:1: with_pst: unknown key; expected one of against, allow_missing, allow_pickle,",
    ),
    "nearest key": (_MODEL + "targts = ['ort']\n", "Did you mean 'targets'?"),
    "unknown table": (_MODEL + "[default]\n", "4:1: default: unknown key; expected one of defaults, model, output."),
    "name in defaults": ("[defaults]\nname = 'b'\n" + _MODEL, "2:1: name: unknown key; expected one of against,"),
    "no name": ('[[model]]\nsource = "builtin:small"\n', "1:1: name: expected a value, got none."),
    "no source": ('[[model]]\nname = "a"\n', "1:1: source: expected a model, as MODEL of rmsnorm export, got none."),
    "a text for a flag": (_MODEL + 'with_past = "yes"\n', "4:1: with_past: expected a valid boolean, got 'yes'."),
    "a text for a list": (_MODEL + 'targets = "ort"\n', "4:1: targets: expected a valid list, got 'ort'."),
    "a number in a list": (
        _MODEL + "dtypes = [\n  'fp16',\n  16]\n",
        "6:3: dtypes[1]: expected a valid string, got 16.",
    ),
    "a flag for a number": (_MODEL + "opset = true\n", "4:1: opset: expected a valid integer, got True."),
    "type in defaults": ("[defaults]\nopset = '23'\n" + _MODEL, "2:1: opset: expected a valid integer, got '23'."),
    "bad name": (
        '[[model]]\nname = "a/b"\nsource = "builtin:small"\n',
        "2:1: name: expected letters, digits, '.', '-'",
    ),
    "two of a name": (
        _MODEL + _MODEL.replace('"a"', '"A"'),
        "5:1: name: expected another name, got 'A', which is the name",
    ),
    "two rows of a name": (
        _MODEL + "targets = ['ort', 'standard']\n" + _MODEL.replace('"a"', '"a-ort"'),
        "6:1: name: expected another name, got 'a-ort', which is the name of [[model]] 1 or of one of its rows",
    ),
    "name of the summary": (
        _MODEL.replace('"a"', '"summary.json"'),
        "2:1: name: expected another name, got 'summary.json'",
    ),
    "unknown target": (
        _MODEL + "targets = ['ort', 'nosuch']\n",
        "4:19: targets[1]: expected one of primitives, standard,",
    ),
    "runtime as target": (_MODEL + "targets = ['tensorrt']\n", "See: rmsnorm targets"),
    "no targets": (_MODEL + "targets = []\n", "4:1: targets: expected at least one, got none; omit the key"),
    "unknown dtype": (_MODEL + "dtypes = ['int8']\n", "4:11: dtypes[0]: expected one of float32, float16, bfloat16,"),
    "a dtype twice": (
        _MODEL + "dtypes = ['fp16', 'half']\n",
        "4:1: dtypes: expected each at most once, got 'float16' 2 times.",
    ),
    "unknown server": (
        _MODEL + "package = ['vllm']\n",
        "4:12: package[0]: expected one of genai, triton, trtexec, ort-server, got 'vllm'.",
    ),
    "unknown attention": (
        _MODEL + "attention = 'flash'\n",
        "4:1: attention: expected one of node, decomposed, in-place, got",
    ),
    "unknown bits": (_MODEL + "quantize = 'int2'\n", "4:1: quantize: expected one of int4, int8, got 'int2'."),
    "no cores": (_MODEL + "cpus = -1\n", "4:1: cpus: expected a number of at least 0, got -1."),
    "endless memory": (_MODEL + "memory = inf\n", "4:1: memory: expected a number of at least 0, got inf."),
    "all GPUs": (_MODEL + "gpus = 'all'\n", "4:1: gpus: expected a valid number, got 'all'."),
    "unknown profile": (
        _MODEL + "lossy = 'in8'\n",
        "4:1: lossy: expected one of int8, int4, fp16, bf16, or none, got 'in8'.",
    ),
    "opset too high": (
        _MODEL + "opset = 99\n",
        "4:1: opset: expected 18 to 23, got 99. Omit opset, or use another target.",
    ),
    "opset too low": (
        _MODEL + "opset = 18\ntargets = ['standard']\n",
        "4:1: opset: target 'standard' requires opset 23, got opset 18.",
    ),
    "no such builtin": (
        '[[model]]\nname = "a"\nsource = "builtin:smal"\n',
        "3:1: source: expected one of builtin:addition, builtin:small",
    ),
    "a builtin with a cache": (
        _MODEL + "with_past = true\n",
        "4:1: with_past: expected a decoder of transformers, got",
    ),
    "results in the source": (
        "output = '.'\n[[model]]\nname = 'folder'\nsource = './folder'\n",
        "4:1: source: expected a folder without the results, got './folder', which holds",
    ),
    "no such folder": (
        '[[model]]\nname = "a"\nsource = "./nosuch"\n',
        "3:1: source: expected an existing folder, .onnx file or file.py:factory",
    ),
    "no such module file": (
        '[[model]]\nname = "a"\nsource = "nosuch.py:net"\n',
        "3:1: source: expected an existing folder, .onnx file or file.py",
    ),
    "a file as a source": (
        '[[model]]\nname = "a"\nsource = "models.py"\n',
        "3:1: source: expected an existing folder, .onnx file or file.py:factory",
    ),
    "no such inputs": (_MODEL + "inputs = 'no.npz'\n", "4:1: inputs: expected a file, got none at"),
    "inputs of another kind": (
        _MODEL + "inputs = 'models.py'\n",
        "4:1: inputs: expected a file .npz or .safetensors, got",
    ),
    "genai without a cache": (
        _MODEL + "package = ['genai']\n",
        "4:1: package: genai runs decoders with a cache: expected with_past",
    ),
    "trtexec for ort": (
        _MODEL + "targets = ['ort']\npackage = ['trtexec']\n",
        "5:1: package: trtexec parses the targets standard,",
    ),
    "quantized for trtexec": (
        _MODEL + "quantize = 'int4'\npackage = ['trtexec']\n",
        "5:1: package: trtexec does not run quantize = 'int4'",
    ),
    "quantized plugin": (
        _MODEL + "targets = ['plugin']\nquantize = 'int4'\n",
        "5:1: quantize: int4 weights are read by com.microsoft",
    ),
    "quantized bfloat16": (
        _MODEL + "dtypes = ['bf16']\nquantize = 'int4'\n",
        "5:1: quantize: ONNX Runtime's CPU provider has no",
    ),
    "in-place elsewhere": (
        _HUB + "attention = 'in-place'\nwith_past = true\ntargets = ['standard']\n",
        "4:1: attention: in-place is for target ort",
    ),
    "in-place without a cache": (
        _MODEL + "attention = 'in-place'\ntargets = ['ort']\n",
        "4:1: attention: in-place writes the KV cache in place",
    ),
    "a file of arrays as a source": (
        _MODEL.replace("builtin:small", "inputs.npz"),
        "3:1: source: expected a model, got a file of arrays, 'inputs.npz'.",
    ),
    "no such .onnx file": (
        _MODEL.replace("builtin:small", "other.onnx"),
        "3:1: source: expected an existing folder, .onnx file or file.py:factory",
    ),
    "against for PyTorch": (
        _MODEL + "against = 'models.py:net'\n",
        "4:1: against: expected a source that is an .onnx file, got 'builtin:small'.",
    ),
    "against a file": (
        _ONNX + "against = 'net.onnx'\n",
        "4:1: against: expected a PyTorch model: an existing folder or file.py:factory",
    ),
    "a dtype for a file": (
        _ONNX + "dtypes = ['fp16']\n",
        "4:1: dtypes: an .onnx file keeps what it has: expected none for such a source, got ['fp16'].",
    ),
    "a file compared with nothing": (
        _ONNX + "validate = true\n",
        "4:1: validate: an .onnx file is compared with PyTorch where against names the model: expected against, got",
    ),
    "packed weights of a file": (_ONNX + "weights = 'pack'\n", "4:1: weights: expected one of copy, link, got 'pack'."),
    "weights elsewhere": (
        _MODEL + "weights = 'reference'\n",
        "4:1: weights: expected one of link, copy, pack, got 'reference'.",
    ),
    "attention of a file": (
        _ONNX + "attention = 'node'\n",
        "4:1: attention: node is for target ort, which has an operator for attention, got target primitives",
    ),
    "a style without plugin": (
        _MODEL + "ort_trt = true\n",
        "4:1: ort_trt: expected the target plugin for ort_trt = true, got none.",
    ),
    "no functions without plugin": (
        _MODEL + "function = false\n",
        "4:1: function: expected the target plugin for function = false, got none.",
    ),
    "unknown runtime": (_MODEL + "build = ['trt']\n", "4:10: build[0]: expected tensorrt or rtx, got 'trt'."),
    "shapes of no engine": (
        _MODEL + "profiles = ['x:1,2,3']\n",
        '4:1: profiles: expected build = ["rtx"] or ["tensorrt"], without which profiles has no effect, got none.',
    ),
    "architectures of TensorRT": (
        _MODEL + "build = ['tensorrt']\narchitectures = ['sm_90']\n",
        "5:1: architectures: TensorRT builds for the GPU of the machine: expected none, got sm_90.",
    ),
    "no such architecture": (
        _MODEL + "build = ['rtx']\narchitectures = ['ada']\n",
        "5:1: architectures: expected a text such as sm_86, got 'ada'.",
    ),
    "unknown norm": (
        _MODEL + "build = ['rtx']\nnorm = 'fused'\n",
        "5:1: norm: expected one of auto, plugin, native, got 'fused'.",
    ),
    "no memory for layers": (
        _MODEL + "build = ['rtx']\nworkspace = 0\n",
        "5:1: workspace: expected at least 1 MiB, got 0.",
    ),
    "an engine of int4": (
        _MODEL + "quantize = 'int4'\nbuild = ['rtx']\n",
        "5:1: build: TensorRT does not run quantize = 'int4'; omit one of them",
    ),
    "unknown runner": (
        _MODEL + "runners = ['onnx']\n",
        "4:12: runners[0]: expected one of ort, tensorrt, rtx, got 'onnx'.",
    ),
    "a runner without engine": (
        _MODEL + "runners = ['ort', 'rtx']\n",
        '4:1: runners: expected build = ["rtx"] for the runner rtx, got none.',
    ),
    "no runner": (_MODEL + "runners = []\n", "4:1: runners: expected at least one, got none; omit the key"),
    "limits without validation": (
        _MODEL + "validate = false\nlossy = 'fp16'\n",
        "5:1: lossy: expected validate = true, without which lossy has no effect, got none.",
    ),
    "unknown provider": (
        _MODEL + "provider = 'gpu'\n",
        "4:1: provider: unknown execution provider 'gpu': expected one of",
    ),
    "a limit below 0": (
        _MODEL + "limits = {logits = {atol = -1}}\n",
        "4:21: atol: expected a number of at least 0, got -1.",
    ),
    "unknown limit": (
        _MODEL + "[model.limits.logits]\natl = 1\n",
        "5:1: atl: unknown key; expected one of atol, max_kl, max_rel, max_rms, min_cosine, min_top1, rtol, ulp",
    ),
    "a limit of no output": (_MODEL + "limits = {atol = 1}\n", "4:11: atol: expected a table, got 1."),
    "bad shape": (
        _MODEL + "shapes = ['3']\n",
        "4:1: shapes: expected a batch and a length of at least 1, such as 3x33",
    ),
    "bad seed": (_MODEL + "seed = -1\n", "4:1: seed: expected a number of at least 0, got -1."),
    "two kinds of inputs": (
        _MODEL + "prompts = ['a']\ntest_inputs = 'inputs.npz'\n",
        "5:1: test_inputs: expected only one of test_inputs and prompts, got both.",
    ),
    "thorough and shapes": (
        _MODEL + "thorough = true\nshapes = ['3x33']\n",
        "4:1: thorough: thorough adds generated inputs: expected no test_inputs, prompts or shapes beside it, got",
    ),
    "limits on what is not compared": (
        _MODEL + "outputs_only = true\nlimits = {'@norms' = {ulp = 1}}\n",
        "1:1: [[model]] 1: limits are given for @norms, but outputs_only skips norms and segments; omit one.",
    ),
    "no such inputs of the comparison": (
        _MODEL + "test_inputs = 'no.safetensors'\n",
        "4:1: test_inputs: expected a file, got none at",
    ),
    "unknown report": (_MODEL + "reports = ['pdf']\n", "4:12: reports[0]: expected one of html, junit, got 'pdf'."),
    "unknown backend": (
        _MODEL + "package = ['triton']\nbackend = 'torch'\n",
        "5:1: backend: expected one of onnxruntime, python, tensorrt, got 'torch'.",
    ),
    "a backend of no server": (
        _MODEL + "backend = 'python'\n",
        '4:1: backend: expected package = ["triton"], without which backend has no effect, got none.',
    ),
    "an engine for Triton that is not built": (
        _MODEL + "package = ['triton']\nbackend = 'tensorrt'\n",
        '5:1: backend: tensorrt runs an engine: expected build = ["tensorrt"], got none.',
    ),
    "a batch below 0": (
        _MODEL + "package = ['triton']\nmax_batch = -1\n",
        "5:1: max_batch: expected a number of at least 0, got -1.",
    ),
    "an engine of two models": (
        _MODEL.replace("builtin:small", "./t5") + "with_past = true\nbuild = ['rtx']\n",
        "5:1: build: an encoder and its decoder are two models: expected no build, got rtx. Build each of them with",
    ),
    "a folder for a server of two models": (
        _MODEL.replace("builtin:small", "./t5") + "with_past = true\npackage = ['triton', 'genai']\n",
        "5:1: package: an encoder and its decoder are two models, which triton alone serves from one folder: expected",
    ),
    "in defaults": ("[defaults]\npackage = ['genai']\n" + _MODEL, "2:1: package: genai runs decoders with a cache"),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_has_its_place_and_reason(mistake: str, path: Path) -> None:
    text, expected = _MISTAKES[mistake]
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, path)
    message = str(caught.value)
    assert message.startswith(f"{path}:")
    assert expected in message
    assert len(message.splitlines()) == 1
    assert "--" not in message


def test_all_problems_are_listed_in_the_order_of_the_file(path: Path) -> None:
    second = _MODEL.replace('"a"', '"b"')
    first = f"{_MODEL.replace('builtin:small', './nosuch')}with_pst = true\n"
    text = f"{first}{second}opset = 1.5\n[[model]]\nname = 'c'\ntargets = ['x', 'y']\n"
    with pytest.raises(UsageError) as caught:
        parse_recipe(text, path)
    lines = [line.removeprefix(f"{path}:").split(": ")[:2] for line in str(caught.value).splitlines()]
    assert lines == [
        ["3:1", "source"],
        ["4:1", "with_pst"],
        ["8:1", "opset"],
        ["9:1", "source"],
        ["11:12", "targets[0]"],
        ["11:17", "targets[1]"],
    ]


def test_fields_come_from_the_model_and_else_from_the_defaults(path: Path) -> None:
    text = "output = 'out'\n[defaults]\ntargets = ['ort']\nopset = 23\nwith_past = true\n"
    text += '[[model]]\nname = "a"\nsource = "models.py:net"\nwith_past = false\ninputs = "inputs.npz"\n'
    path.write_text(text + '[[model]]\nname = "b"\nsource = "owner/b"\n')
    recipe = read_recipe(path)
    assert recipe.output == path.parent / "out"
    shared = {"targets": ["ort"], "opset": 23}
    assert recipe.models == (
        {"name": "a", "source": "models.py:net", "with_past": False, "inputs": "inputs.npz", **shared},
        {"name": "b", "source": "owner/b", "with_past": True, **shared},
    )


# A default that a model cannot have, and such a model.
_UNFIT = {
    "dtypes": ("dtypes = ['float16']\nstatic = true\nwith_past = true\nquantize = 'int4'", _ONNX),
    "against": ("against = 'models.py:net'", _MODEL),
    "weights": ("weights = 'pack'", _ONNX),
    "validate": ("validate = true", _ONNX),
    "revision": ("revision = 'main'\nsubfolder = 'small'", _MODEL),
    "revision of a file": ("revision = 'main'", _ONNX + "against = 'models.py:net'\n"),
    "cache": ("with_past = true", _MODEL),
    "plugin": ("function = false\nort_trt = false", _MODEL),
}


@pytest.mark.parametrize("unfit", _UNFIT)
def test_a_default_that_a_model_cannot_have_is_not_its(unfit: str, path: Path) -> None:
    defaults, model = _UNFIT[unfit]
    read = parse_recipe(f"[defaults]\n{defaults}\n{model}", path)
    assert read.models == parse_recipe(model, path).models
    own = f"{model}{defaults}\n"
    with pytest.raises(UsageError, match=r"rmsnorm\.toml:[4-8]:1: "):
        parse_recipe(own, path)


def test_defaults_that_fit_stay(path: Path) -> None:
    text = "[defaults]\nvalidate = false\nweights = 'copy'\nagainst = 'models.py:net'\nrevision = 'main'\n"
    read = parse_recipe(text + _ONNX + _HUB.replace('"a"', '"b"') + "dtypes = []\n", path)
    shared = {"validate": False, "weights": "copy"}
    assert read.models == (
        {"name": "a", "source": "net.onnx", "against": "models.py:net", **shared},
        {"name": "b", "source": "owner/name", "revision": "main", "dtypes": [], **shared},
    )


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no such file\. Write one with: rmsnorm init MODEL -o"):
        read_recipe(path)
    path.write_bytes(b"a = 1\nb = '\xff'")
    with pytest.raises(UsageError, match=r"rmsnorm.toml:2:6: expected UTF-8, got the byte 0xff"):
        read_recipe(path)
    with pytest.raises(UsageError, match="expected a regular file, got a folder"):
        read_recipe(path.parent)


def test_a_model_can_have_none_of_a_default(path: Path) -> None:
    text = "[defaults]\nquantize = 'int4'\nlossy = 'int4'\ntargets = ['ort']\n"
    plain = _MODEL + "quantize = 'none'\nlossy = 'none'\ndtypes = ['fp16']\n"
    first, second = parse_recipe(text + _MODEL.replace('"a"', '"b"') + plain, path).models
    assert (first["quantize"], first["lossy"]) == ("int4", "int4")
    assert {"quantize", "lossy"} & second.keys() == set()
    assert parse_recipe(_MODEL + "quantize = 'none'\n", path).models[0].keys() == {"name", "source"}
