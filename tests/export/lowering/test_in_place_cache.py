"""Attentions that write the cache in place: what they compute, where they are refused, and one buffer for the cache."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from rmsnorm_deploy import export_model
from rmsnorm_deploy.export.from_torch.lower import lower_graph
from rmsnorm_deploy.export.graph.cache_names import is_past, present_to_past
from rmsnorm_deploy.export.graph.captured_nodes import ATTENTION_OP, CAPTURE_DOMAIN
from rmsnorm_deploy.models.attention.spec import AttentionSpec
from rmsnorm_deploy.models.errors import UnsupportedError, UsageError
from rmsnorm_deploy.runtime.generation.api import generate, generate_batch
from rmsnorm_deploy.runtime.runners.decoding import HostDecoding
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.tensorrt.network import read_network
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.graphs.capture_graph import DATA_TYPES, GraphMaker
from tests.helpers.models.families import build
from tests.helpers.runtime.feeds import step_feeds

BATCH = [[5, 17, 40, 8, 33, 61], [9, 12], [44, 3, 70, 21]]
# Without anything special; with sinks and a window; with a window.
NAMES = ("qwen3", "gpt_oss", "gemma3")


@pytest.fixture(scope="module", params=NAMES)
def exported(request, tmp_path_factory):
    model = build(request.param)
    model.generation_config.eos_token_id = None
    folder = tmp_path_factory.mktemp(request.param)
    for mode in ("in-place", "node"):
        export_model(model, folder / mode, target="ort", with_past=True, attention=mode)
    return request.param, model, folder


def rows_of(folder):
    return json.loads((folder / "manifest.json").read_text())["attention"]


def test_the_manifest_says_which_attentions_write_in_place(exported):
    folder = exported[2]
    rows = rows_of(folder / "in-place")
    assert len(rows) > 1
    assert all("GroupQueryAttention" in row["emits"] and "reason" not in row for row in rows)
    manifest = json.loads((folder / "in-place" / "manifest.json").read_text())
    assert len(manifest["in_place_cache"]) == 2 * len(rows)
    assert manifest["requires"] == {"onnxruntime": "1.32"}
    assert "in_place_cache" not in json.loads((folder / "node" / "manifest.json").read_text())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_the_tokens_of_a_padded_batch_are_those_of_the_file_with_a_growing_cache(exported, settings):
    _, model, folder = exported
    wanted = [one.ids for one in generate_batch(folder / "node", BATCH, max_new_tokens=80, **settings)]
    assert [one.ids for one in generate_batch(folder / "in-place", BATCH, max_new_tokens=80, **settings)] == wanted
    with torch.no_grad():
        own = model.generate(torch.tensor(BATCH[:1]), max_new_tokens=80, do_sample=False, **settings)[0].tolist()
    assert BATCH[0] + generate(folder / "in-place", BATCH[0], max_new_tokens=80, **settings).ids == own


def test_a_step_writes_into_the_buffers_which_grow_by_doubling(exported):
    with OrtRunner(exported[2] / "in-place" / "model.onnx") as runner:
        own, host, read, sizes = runner.decoding(), HostDecoding(runner), 0, []
        for tokens in (5, 1, 57, 3, 1, 80, 1):
            read += tokens
            feeds = step_feeds(runner, tokens, read)
            before = {name: value.data_ptr() for name, value in own._buffers.values.items()}
            np.testing.assert_allclose(own.step(feeds), host.step(feeds), atol=1e-5)
            sizes.append(next(iter(own._buffers.values.values())).shape()[2])
            if len(sizes) > 1 and sizes[-1] == sizes[-2]:
                assert {name: value.data_ptr() for name, value in own._buffers.values.items()} == before
        assert sizes == [64, 64, 64, 128, 128, 256, 256]


def test_projections_reach_the_operator_without_other_layouts(exported):
    graph = onnx.load(exported[2] / "in-place" / "model.onnx", load_external_data=False).graph
    made_by = {name: node for node in graph.node for name in node.output}
    grouped = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    # gpt_oss spells the rotary embedding in another way, and gemma3 has a norm behind the Transpose.
    wanted = {"qwen3": "RotaryEmbedding"}.get(exported[0], "Reshape")
    assert {made_by[name].op_type for node in grouped for name in node.input[:2]} == {wanted}
    assert made_by[grouped[0].input[2]].op_type not in ("Reshape", "Transpose")
    joined = {node.input[0] for node in graph.node if node.op_type == "Reshape"}
    assert not joined & {node.output[0] for node in grouped}


def test_a_failed_step_can_be_repeated(exported):
    with OrtRunner(exported[2] / "in-place" / "model.onnx") as runner:
        own, host = runner.decoding(), HostDecoding(runner)
        own.step(step_feeds(runner, 4, 4))
        with pytest.raises(UsageError, match="onnxruntime failed"):
            own.step(step_feeds(runner, 1, 5, batch=3))
        host.step(step_feeds(runner, 4, 4))
        np.testing.assert_allclose(own.step(step_feeds(runner, 1, 5)), host.step(step_feeds(runner, 1, 5)), atol=1e-5)
        own.restart()
        host.restart()
        feeds = step_feeds(runner, 3, 3)
        np.testing.assert_allclose(own.step(feeds), host.step(feeds), atol=1e-5)


def test_a_chunk_of_a_batch_behind_a_cache_without_a_buffer(exported):
    """As other tools run the file: the cache grows, in a batch with several tokens."""
    results = []
    for mode in ("in-place", "node"):
        with OrtRunner(exported[2] / mode / "model.onnx") as runner:
            first = runner.run(step_feeds(runner, 5, 5, batch=3))
            past = {n: v for n, v in present_to_past(first).items() if n in {i.name for i in runner.inputs()}}
            results.append(runner.run({**step_feeds(runner, 4, 9, batch=3), **past}))
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, atol=2e-5)


def test_a_file_passes_validation_with_its_attentions_alone(exported):
    _, model, folder = exported
    report = validate(folder / "in-place", model, shapes=((2, 9),))
    assert (report.verdict, report.culprits) == ("pass", [])
    assert [one.passed for one in report.attentions] == [True] * len(rows_of(folder / "in-place"))


def test_where_it_cannot_be(tmp_path):
    model = build("llama")
    with pytest.raises(UsageError, match=r"attention: in-place is for target ort, .* got target standard"):
        export_model(model, tmp_path / "out", target="ort,standard", with_past=True, attention="in-place")
    with pytest.raises(UsageError, match="in-place writes the KV cache in place, and the export has none"):
        export_model(model, tmp_path / "out", target="ort", attention="in-place")
    assert not (tmp_path / "out").exists()


def test_tensorrt_is_told(exported):
    with pytest.raises(UnsupportedError, match=r"GroupQueryAttention .*--attention node"):
        read_network(exported[2] / "in-place" / "model.onnx")


def captured(mask_of, width=8):
    """A captured graph of one attention behind a cache, whose mask a function makes."""
    maker = GraphMaker(DATA_TYPES[torch.float32])
    tokens = maker.input("input_ids", ["b", "s"], ir.DataType.INT64)
    mask = maker.input("attention_mask", ["b", "t"], ir.DataType.INT64)
    q = maker.input("q", ["b", 4, "s", width])
    new = maker.input("new", ["b", 2, "s", width])
    past = [maker.input(f"past_key_values.0.{kind}", ["b", 2, "p", width]) for kind in ("key", "value")]
    k, v = (
        maker.node("Concat", [one, new], f"present.0.{kind}", ["b", 2, "t", width], {"axis": 2})
        for one, kind in zip(past, ("key", "value"), strict=True)
    )
    bias = mask_of(maker, tokens, mask, past[0])
    attributes = {"spec": AttentionSpec(0.35).to_json(), "path": "a", "heads": 4, "groups": 2}
    y = maker.node(ATTENTION_OP, [q, k, v, bias, None], "y", ["b", "s", 4, width], attributes, domain=CAPTURE_DOMAIN)
    graph = maker.graph([y, k, v])
    graph.opset_imports[CAPTURE_DOMAIN] = 1
    return ir.Model(graph, ir_version=10)


def whole(maker, name, values):
    """A constant of whole numbers."""
    value = maker.value(name, [len(values)], ir.DataType.INT64)
    value.const_value = ir.Tensor(np.array(values), name=name)
    maker.initializers.append(value)
    return value


def padding_only(maker, tokens, mask, past):
    """Hides padding, and shows later keys, as an encoder's mask does."""
    axes, one = whole(maker, "axes", [1, 2]), whole(maker, "one", [1])
    floats = {name: maker.initializer(name, torch.tensor(value)) for name, value in (("1", 1.0), ("low", -3.4e38))}
    integers, shape = {"dtype": ir.DataType.INT64}, ["b", 1, "s", "t"]
    four = maker.node("Unsqueeze", [mask, axes], "four", ["b", 1, 1, "t"], **integers)
    length = maker.node("Shape", [tokens], "length", [1], {"start": 1, "end": 2}, **integers)
    size = maker.node("Concat", [one, one, length, one], "size", [4], {"axis": 0}, **integers)
    wide = maker.node("Expand", [four, size], "wide", shape, **integers)
    cast = maker.node("Cast", [wide], "cast", shape, {"to": int(ir.DataType.FLOAT)})
    return maker.node("Mul", [maker.node("Sub", [floats["1"], cast], "off", shape), floats["low"]], "bias", shape)


def test_a_mask_that_shows_later_keys_keeps_the_operator():
    lowered = lower_graph(captured(padding_only), "ort", attention="in-place")
    (attention,) = lowered.attentions
    assert attention.reason == "its mask shows later keys"
    assert attention.cell.is_operator
    assert lowered.in_place == []


def causal(maker, tokens, mask, past, *, window=None, positions=False):
    """Hides padding and later keys, and with a window keys that are as far back as it is wide."""
    integers, truth = {"dtype": ir.DataType.INT64}, {"dtype": ir.DataType.BOOL}
    scalars = {}
    for name, value in (("zero", 0), ("one", 1), ("width", window or 0)):
        scalars[name] = maker.value(name, [], ir.DataType.INT64)
        scalars[name].const_value = ir.Tensor(np.array(value), name=name)
        maker.initializers.append(scalars[name])
    first, last = whole(maker, "first", [0]), whole(maker, "last", [-1])
    ends = {}
    for name, value, axis in (("total", mask, 1), ("old", past, 2)):
        size = maker.node("Shape", [value], f"{name}_size", [1], {"start": axis, "end": axis + 1}, **integers)
        ends[name] = maker.node("Squeeze", [size, first], name, [], **integers)
    keys = maker.node("Range", [scalars["zero"], ends["total"], scalars["one"]], "keys", ["t"], **integers)
    if positions:
        given = maker.input("position_ids", ["b", "s"], ir.DataType.INT64)
        queries = maker.node("Gather", [given, scalars["zero"]], "queries", ["s"], **integers)
    else:
        queries = maker.node("Range", [ends["old"], ends["total"], scalars["one"]], "queries", ["s"], **integers)
    column = maker.node("Unsqueeze", [queries, last], "column", ["s", 1], **integers)
    shown = maker.node("LessOrEqual", [keys, column], "seen", ["s", "t"], **truth)
    if window is not None:
        back = maker.node("Sub", [column, keys], "back", ["s", "t"], **integers)
        near = maker.node("Less", [back, scalars["width"]], "near", ["s", "t"], **truth)
        shown = maker.node("And", [shown, near], "both", ["s", "t"], **truth)
    bits = maker.node("Cast", [mask], "bits", ["b", "t"], {"to": int(ir.DataType.BOOL)}, **truth)
    axes = whole(maker, "axes", [1, 2])
    padded = maker.node("Unsqueeze", [bits, axes], "padded", ["b", 1, 1, "t"], **truth)
    kept = maker.node("And", [shown, padded], "kept", ["b", 1, "s", "t"], **truth)
    floats = [maker.initializer(name, torch.tensor(value)) for name, value in (("0", 0.0), ("low", -3.4e38))]
    return maker.node("Where", [kept, *floats], "bias", ["b", 1, "s", "t"])


def remaining(**options):
    """The operators that compute the mask of an attention in place."""
    graph = lower_graph(captured(partial(causal, **options)), "ort", attention="in-place").model.graph
    (node,) = [node for node in graph if node.op_type == "GroupQueryAttention"]
    found, pending = set(), [node.inputs[10]]
    while pending:
        made = pending.pop().producer()
        if made is not None:
            found.add(made.op_type)
            pending += made.inputs
    return found


def test_a_mask_of_later_keys_and_padding_is_written_with_the_padding_alone():
    assert remaining() == {"Unsqueeze", "Cast", "Where", "Shape", "Concat", "Expand"}


@pytest.mark.parametrize("window", [8, 200, 1 << 20])
def test_a_mask_with_a_window_stays(window):
    """The widest is not computed, and may be one."""
    assert {"Less", "LessOrEqual", "Range"} <= remaining(window=window)


def test_a_mask_that_follows_positions_stays():
    """They may begin anew within a row."""
    assert {"Gather", "LessOrEqual"} <= remaining(positions=True)


def test_a_width_that_the_operator_does_not_have():
    lowered = lower_graph(captured(padding_only, width=6), "ort", attention="in-place")
    assert lowered.attentions[0].reason == "expected heads of one width that 8 divides, got 6 and 6"


def test_a_file_names_no_cache_of_other_files(exported):
    metadata = {row.key: row.value for row in onnx.load(exported[2] / "in-place" / "model.onnx").metadata_props}
    names = json.loads(metadata["rmsnorm_deploy.in_place"])
    assert all(is_past(name) for name in names)
