"""A column of texts: tokens, the inputs that follow from them, and results that are those of each text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmsnorm_deploy import export_model, run_dataset
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.dataset.texts import per_token
from rmsnorm_deploy.runtime.inputs.tokenizer import load_tokenizer
from rmsnorm_deploy.runtime.runners.base import TensorInfo
from tests.helpers.models.families import build
from tests.helpers.models.tokenizers import save_bpe_tokenizer

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = ["hello world", "a", "how are you today?", "hello", "b", "hello world, hello world"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A decoder with a tokenizer, and its export."""
    folder = tmp_path_factory.mktemp("texts")
    model = build("qwen3", vocab_size=290, num_hidden_layers=1).eval()
    model.save_pretrained(folder / "checkpoint")
    save_bpe_tokenizer(folder / "checkpoint", 290)
    export_model(str(folder / "checkpoint"), folder / "out", target="ort")
    return model, folder / "out"


def _data(folder: Path, texts: list[str | None]) -> Path:
    path = folder / "data.parquet"
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path)
    return path


def test_each_text_has_the_result_that_it_has_alone(exported: tuple[Any, Path], tmp_path: Path) -> None:
    import torch

    model, folder = exported
    data = _data(tmp_path, TEXTS)
    done = run_dataset(folder, data, tmp_path / "out", columns={"input_ids": "text"}, rows=4, batch=3)
    assert (done.rows, done.parts, done.ran) == (6, 2, 2)
    table = pq.read_table(tmp_path / "out")
    assert (table.column("text").to_pylist(), table.column("id").to_pylist()) == (TEXTS, list(range(6)))
    reader = load_tokenizer(folder)
    for text, logits in zip(TEXTS, table.column("logits").to_pylist(), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([reader.encode(text)])).logits[0].numpy()
        np.testing.assert_allclose(np.array(logits, np.float32), wanted, atol=1e-5)
    assert run_dataset(folder, data, tmp_path / "out", columns={"input_ids": "text"}, rows=4, batch=3).ran == 0


def test_texts_are_cut_off_only_where_that_was_asked_for(exported: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = exported
    data = _data(tmp_path, TEXTS)
    ask: dict[str, Any] = {"columns": {"input_ids": "text"}, "outputs": ["logits"]}
    run_dataset(folder, data, tmp_path / "all", **ask)
    run_dataset(folder, data, tmp_path / "cut", max_tokens=2, **ask)
    whole, cut = (pq.read_table(tmp_path / name).column("logits").to_pylist() for name in ("all", "cut"))
    assert [len(row) for row in cut] == [min(len(row), 2) for row in whole]
    assert max(len(row) for row in whole) > 2
    with pytest.raises(UsageError, match="got those of another run"):
        run_dataset(folder, data, tmp_path / "cut", max_tokens=3, **ask)


def test_what_cannot_be_read(exported: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = exported
    ask: dict[str, Any] = {"columns": {"input_ids": "text"}}
    for text, message in (
        (None, r"column text: expected a text everywhere, got none in row 1"),
        ("", r"column text: the text in row 1: the prompt is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            run_dataset(folder, _data(tmp_path, ["a", text]), tmp_path / "out", **ask)
    data = _data(tmp_path, ["a"])
    with pytest.raises(
        UsageError, match="tokenizer: expected texts in a column for input_ids, got int64 in the column 'id'"
    ):
        run_dataset(folder, data, tmp_path / "ids", columns={"input_ids": "id"}, tokenizer=folder)
    for path in folder.glob("model*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").rename(tmp_path / "alone.onnx")
    with pytest.raises(UsageError, match=r"expected a tokenizer for its texts, got none in .*alone\.onnx"):
        run_dataset(tmp_path / "alone.onnx", data, tmp_path / "out2", **ask)
    assert run_dataset(tmp_path / "alone.onnx", data, tmp_path / "out2", tokenizer=folder, **ask).rows == 1


@pytest.mark.parametrize("kind", ["large", "dictionary", "dictionary of large", "view"])
def test_every_kind_of_text(kind: str, exported: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = exported
    column = pa.array(TEXTS, pa.large_string() if "large" in kind else pa.string())
    if kind == "view":
        column = column.cast(pa.string_view())
    if kind.startswith("dictionary"):
        column = column.dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "kind.parquet")
    plain = _data(tmp_path, list(TEXTS))
    ask: dict[str, Any] = {"columns": {"input_ids": "text"}, "outputs": ["logits"]}
    run_dataset(folder, tmp_path / "kind.parquet", tmp_path / "out", **ask)
    run_dataset(folder, plain, tmp_path / "plain", **ask)
    found, wanted = (pq.read_table(tmp_path / name) for name in ("out", "plain"))
    assert found.column("logits").to_pylist() == wanted.column("logits").to_pylist()
    assert found.column("text").to_pylist() == TEXTS


def test_a_row_that_cannot_be_read_is_named_by_its_number_in_the_file(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    _, folder = exported
    data = _data(tmp_path, ["a", "b", "hello", ""])
    with pytest.raises(UsageError, match=r"data\.parquet: column text: the text in row 3: "):
        run_dataset(folder, data, tmp_path / "out", columns={"input_ids": "text"}, rows=2)
    with pytest.raises(UsageError, match="max_tokens: expected a column of texts for input_ids, got none"):
        run_dataset(folder, data, tmp_path / "ids", columns={"input_ids": "id"}, max_tokens=2)


def test_inputs_that_follow_from_tokens() -> None:
    tokens = np.array([[5, 6, 7]], np.int64)
    names = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "pixels")
    infos = [TensorInfo(name, "int64", ("batch", "length")) for name in names]
    found = per_token(tokens, {"input_ids": tokens, "attention_mask": tokens}, infos)
    assert {name: array.tolist() for name, array in found.items()} == {
        "position_ids": [[0, 1, 2]], "token_type_ids": [[0, 0, 0]],
    }  # fmt: skip
