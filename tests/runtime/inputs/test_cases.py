"""Inputs that a user gives: files, folders, Python code, prompts; and what the generated floats cover."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rmsnorm_deploy.models.builtin.addition_task import TOKENIZER
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UsageError
from rmsnorm_deploy.runtime.inputs.cases import load_cases, prompt_cases
from rmsnorm_deploy.runtime.inputs.synthetic import DEFAULT_SHAPES, make_feeds
from rmsnorm_deploy.runtime.inputs.tokenizer import load_tokenizer
from rmsnorm_deploy.runtime.runners.base import TensorInfo

IDS = TensorInfo("input_ids", "int64", ("batch", "sequence"))
HIDDEN = TensorInfo("x", "float32", ("batch", "sequence", 4))
FLOATS = np.arange(8, dtype=np.float32).reshape(1, 2, 4)


def of_dtype(dtype: str) -> list[TensorInfo]:
    return [TensorInfo("x", dtype, ("batch", "sequence", 4))]


# ----------------------------------------------------------------------------------------------------------- files


def test_a_file_is_one_case(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=FLOATS)
    (case,) = load_cases(str(tmp_path / "a.npz"), [HIDDEN])
    assert case.name == "a.npz"
    assert np.array_equal(case.feeds["x"], FLOATS)
    save_file({"x": torch.from_numpy(FLOATS).bfloat16()}, tmp_path / "a.safetensors")
    (case,) = load_cases(str(tmp_path / "a.safetensors"), of_dtype("bfloat16"))
    assert case.feeds["x"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(case.feeds["x"].astype(np.float32), FLOATS)


def test_a_folder_has_a_case_for_each_file_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"contains no \.npz or \.safetensors file"):
        load_cases(str(tmp_path), [HIDDEN])
    np.savez(tmp_path / "b.npz", x=FLOATS + 1)
    save_file({"x": torch.from_numpy(FLOATS + 2)}, tmp_path / "c.safetensors")
    np.savez(tmp_path / "a.npz", x=FLOATS)
    (tmp_path / "notes.txt").write_text("not an input")
    (tmp_path / "d.npz").mkdir()
    cases = load_cases(str(tmp_path), [HIDDEN])
    assert [(case.name, float(case.feeds["x"][0, 0, 0])) for case in cases] == [
        ("a.npz", 0.0), ("b.npz", 1.0), ("c.safetensors", 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_is_rounded_to_the_halves(dtype: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.full((1, 1, 4), 1 + 2**-9, np.float32))
    (case,) = load_cases(str(tmp_path / "a.npz"), of_dtype(dtype))
    assert case.feeds["x"].dtype.name == dtype
    assert float(case.feeds["x"][0, 0, 0]) == (1 + 2**-9 if dtype == "float16" else 1.0)


def test_integers_are_exchanged_where_no_value_changes(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.array([[1, 2]], np.int32))
    assert load_cases(str(tmp_path / "a.npz"), [IDS])[0].feeds["input_ids"].dtype == np.int64
    narrow = TensorInfo("input_ids", "int32", ("batch", "sequence"))
    np.savez(tmp_path / "a.npz", input_ids=np.array([[1, 2]]))
    (case,) = load_cases(str(tmp_path / "a.npz"), [narrow])
    assert (case.feeds["input_ids"].dtype, case.feeds["input_ids"].tolist()) == (np.int32, [[1, 2]])
    np.savez(tmp_path / "a.npz", input_ids=np.array([[1, 2**40]]))
    with pytest.raises(UsageError, match=r"case a\.npz: input input_ids: expected dtype int32, got int64"):
        load_cases(str(tmp_path / "a.npz"), [narrow])


@pytest.mark.parametrize(
    ("array", "infos", "message"),
    [
        (FLOATS.astype(np.float64), of_dtype("float32"), "expected dtype float32, got float64"),
        (FLOATS.astype(np.float16), of_dtype("float32"), "expected dtype float32, got float16"),
        (FLOATS[..., :3], [HIDDEN], "dim 2 must be 4"),
        (FLOATS, [HIDDEN, IDS], "missing: input_ids"),
    ],
)
def test_a_case_that_does_not_fit_is_named(
    array: np.ndarray, infos: list[TensorInfo], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "good.npz", x=array)
    with pytest.raises(UsageError, match=r"case good\.npz: inputs? ") as error:
        load_cases(str(tmp_path), infos)
    assert message in str(error.value)


def test_the_inputs_of_a_module_are_not_checked(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=FLOATS, mask=np.ones(2, np.int64))
    for infos in ([], [TensorInfo("x", "any", None)]):
        (case,) = load_cases(str(tmp_path / "a.npz"), infos)
        assert sorted(case.feeds) == ["mask", "x"]


# ----------------------------------------------------------------------------------------------------------- code

_CODE = """
import numpy as np
import torch

X = np.ones((1, 2, 4), np.float32)

def one():
    return {"x": X}

def several():
    yield {"x": X}
    yield "named", {"x": torch.full((1, 2, 4), 2.0)}

def pairs():
    return [("a", {"x": X}), ("b", {"x": X * 3})]

def halves():
    return {"x": torch.ones(1, 2, 4, dtype=torch.bfloat16)}

def fails():
    yield {"x": X}
    raise RuntimeError("no luck")

def nothing():
    return []

def lists():
    return {"x": [1.0]}

def number():
    return 3

def arrays():
    return [X]

def quantized():
    return {"x": torch.ones(4).to(torch.float8_e4m3fn)}

def needs(argument):
    return {"x": X}

not_a_function = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    path = tmp_path / "made_inputs.py"
    path.write_text(_CODE)
    return str(path)


def test_python_code_returns_or_yields_cases(code: str) -> None:
    def made(name: str) -> list[tuple[str, float]]:
        return [(case.name, float(case.feeds["x"][0, 0, 0])) for case in load_cases(f"{code}:{name}", [HIDDEN])]

    assert made("one") == [("case 1", 1.0)]
    assert made("several") == [("case 1", 1.0), ("named", 2.0)]
    assert made("pairs") == [("a", 1.0), ("b", 3.0)]
    (case,) = load_cases(f"{code}:halves", of_dtype("bfloat16"))
    assert case.feeds["x"].dtype == ml_dtypes.bfloat16


def test_python_code_in_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inputs_of_mine.py").write_text(_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    assert len(load_cases("inputs_of_mine:several", [HIDDEN])) == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("fails", "RuntimeError: no luck"),
        ("nothing", "returned no case"),
        ("lists", "x: expected a numpy array or a torch tensor, got list"),
        ("number", "case 1: expected a dict of input name to array, or a pair of a name and such a dict, got int"),
        ("arrays", "case 1: expected a dict of input name to array, or a pair of a name and such a dict, got ndarray"),
        ("quantized", "x is torch.float8_e4m3fn, a dtype that numpy does not support"),
        ("needs", "TypeError"),
        ("not_a_function", "TypeError"),
        ("nosuch", "no attribute 'nosuch'"),
    ],
)
def test_python_code_without_valid_cases(code: str, function: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_cases(f"{code}:{function}", [HIDDEN])
    assert message in str(error.value)


def test_sources_that_do_not_exist(code: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected .*made_inputs\.py:function, with a function"):
        load_cases(code, [HIDDEN])
    with pytest.raises(UsageError, match="there is no such file"):
        load_cases(str(tmp_path / "nosuch.npz"), [HIDDEN])
    with pytest.raises(UsageError, match=r"the file .*nosuch\.py does not exist"):
        load_cases(f"{tmp_path}/nosuch.py:f", [HIDDEN])


# --------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of four words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"the": 0, "quick": 1, "fox": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(str(folder))
    return str(folder)


def test_prompts_fill_everything_that_a_decoder_reads(tokenizer: str) -> None:
    infos = [
        IDS,
        TensorInfo("attention_mask", "int64", ("batch", "past_sequence + sequence")),
        TensorInfo("position_ids", "int64", ("batch", "sequence")),
        TensorInfo("past_key_values.0.key", "float16", ("batch", 2, "past_sequence", 8)),
    ]
    cases = prompt_cases(["the quick fox", "fox the what then and so on, the quick fox"], tokenizer, infos)
    assert [case.name for case in cases] == ["prompt 1 'the quick fox'", "prompt 2 'fox the what then and s…'"]
    feeds = cases[0].feeds
    assert {name: array.tolist() for name, array in feeds.items() if name != "past_key_values.0.key"} == {
        "input_ids": [[0, 1, 2]], "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]],
    }  # fmt: skip
    past = feeds["past_key_values.0.key"]
    assert (past.dtype, past.shape) == (np.float16, (1, 2, 0, 8))
    assert cases[1].feeds["input_ids"][0, :3].tolist() == [2, 0, 3]


def test_prompts_for_a_module_without_dtypes(tokenizer: str) -> None:
    infos = [TensorInfo("input_ids", "any", None), TensorInfo("attention_mask", "any", None)]
    (case,) = prompt_cases(["quick fox"], tokenizer, infos)
    assert {name: (array.dtype, array.tolist()) for name, array in case.feeds.items()} == {
        "input_ids": (np.int64, [[1, 2]]), "attention_mask": (np.int64, [[1, 1]]),
    }  # fmt: skip


def test_prompts_of_the_addition_task(tmp_path: Path) -> None:
    (case,) = prompt_cases(["012+345="], "builtin:addition", [IDS])
    assert case.feeds["input_ids"].tolist() == [[0, 1, 2, 10, 3, 4, 5, 11]]
    (tmp_path / "manifest.json").write_text(json.dumps({"tokenizer": TOKENIZER}))
    assert load_tokenizer(tmp_path).decode([1, 10, 2]) == "1+2"
    with pytest.raises(UsageError, match="the vocabulary is"):
        prompt_cases(["one"], "builtin:addition", [IDS])


def test_prompts_that_cannot_be(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"reads input_ids; this model reads x"):
        prompt_cases(["the"], tokenizer, [HIDDEN])
    with pytest.raises(UsageError, match="at least one"):
        prompt_cases([], tokenizer, [IDS])
    with pytest.raises(UsageError, match=r"prompt is empty"):
        prompt_cases([""], tokenizer, [IDS])
    with pytest.raises(UsageError, match=r"contains no tokenizer \(tokenizer\.json"):
        prompt_cases(["the"], str(tmp_path), [IDS])
    fixed = TensorInfo("input_ids", "int64", (1, 8))
    with pytest.raises(UsageError, match=r"case prompt 1 'the fox': input input_ids: .* \(dim 1 must be 8\)"):
        prompt_cases(["the fox"], tokenizer, [fixed])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="transformers could not load the tokenizer"):
        prompt_cases(["the"], str(tmp_path), [IDS])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentMissingError, match=r"rmsnorm-deploy\[hf\]"):
        prompt_cases(["the"], tokenizer, [IDS])


# --------------------------------------------------------------------------------------------------- generated inputs


def floats(batch: int, length: int, seed: int = 0) -> Any:
    info = TensorInfo("x", "float64", ("batch", "sequence", 64))
    return make_feeds([info], batch, length, seed, None)["x"]


def test_the_default_shapes_have_every_character_of_floats() -> None:
    one, seven, many = (floats(*shape) for shape in DEFAULT_SHAPES)
    assert 1e-5 < np.sqrt(np.mean(one**2)) < 1e-3
    assert 300 < np.sqrt(np.mean(seven**2)) < 3000
    by_channel = np.sqrt(np.mean(many**2, axis=(0, 1)))
    assert np.sum(by_channel > 15) == 2
    assert 0.5 < np.median(by_channel) < 2


def test_a_cache_leaves_the_characters_as_they_are() -> None:
    """A decoder with a cache runs one token more."""
    for batch, length in DEFAULT_SHAPES:
        plain, longer = floats(batch, length), floats(batch, length + 1)
        assert 0.2 < np.median(np.abs(longer)) / np.median(np.abs(plain)) < 5


def test_seeds_decide_and_move_the_characters_on() -> None:
    assert np.array_equal(floats(3, 33), floats(3, 33))
    assert not np.array_equal(floats(3, 33), floats(3, 33, seed=3))
    sizes = [np.median(np.abs(floats(3, 33, seed=seed))) for seed in range(3)]
    assert sizes[2] < 1e-3 < 0.1 < sizes[0] < 10 < 100 < sizes[1]


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        (("batch_size", "sequence_length"), (2, 9)),
        (("batch_size", "past_sequence_length + sequence_length"), (2, 9)),
        (("batch_size", "past_sequence_length + 1"), (2, 1)),
        (("batch_size", 4, "past_sequence_length", 8), (2, 4, 0, 8)),
        (("sequence_length", "batch_size", 8), (9, 2, 8)),
        (("n", 3, "height", "width"), (2, 3, 9, 9)),
        ((None, None), (2, 9)),
    ],
)
def test_open_dims_get_sizes_by_their_names(dims: tuple[int | str | None, ...], sizes: tuple[int, ...]) -> None:
    assert make_feeds([TensorInfo("x", "float32", dims)], 2, 9, 0, None)["x"].shape == sizes
