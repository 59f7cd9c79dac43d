"""Capturing: names of dims and outputs, caches, scalars, refusals, and what upstream's errors become.

torch's and transformers' exporters are replaced by ones that return a graph made by hand; test_export_model and
the families' tests run the real ones.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture import transformers_model as module
from rmsnorm_deploy.export.capture.capture import capture, capture_opset, detached
from rmsnorm_deploy.export.capture.captured import Capture
from rmsnorm_deploy.export.capture.transformers_model import is_pretrained
from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from tests.helpers.graphs.onnx_text import parsed


class PreTrainedModel(nn.Module):
    """Takes the place of transformers' class, which is known by its name."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class Llama(PreTrainedModel):
    pass


class Two(nn.Module):
    """Two inputs, and two outputs, each a tensor in `result`."""

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Any, y: Any, flag: bool = False) -> Any:
        if self.result is not None:
            return self.result
        return x + y, 2 * x


def dims(values: Any) -> dict[str, list[Any]]:
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in values}


def names(values: Any) -> list[str]:
    return [value.name for value in values]


# Any other module -----------------------------------------------------------------------------------------------------


GRAPH = "g (float[s0, s1] x, float[s0, s1] y) => (float[s0, s1] a, float[s0, s1] b) { a = Add (x, y)  b = Neg (x) }"
ONE = torch.ones(1)
INPUTS = {"x": torch.ones(2, 3), "y": torch.ones(2, 3)}


def captured(
    monkeypatch: pytest.MonkeyPatch, outputs: Any = None, fixed: dict[str, tuple[int, int]] | None = None,
    model: nn.Module | None = None, inputs: dict[str, Any] | None = None, **arguments: Any,
) -> tuple[Capture, dict[str, Any]]:  # fmt: skip
    """A module captured as `GRAPH`, and what torch's exporter was asked for.

    `outputs` is what the module returns; `fixed` the bounds that the exporter found for its symbols.
    """
    asked: dict[str, Any] = {}

    def export(called: nn.Module, *_: Any, **options: Any) -> Any:
        asked.update(options)
        called(**options["kwargs"])
        program = SimpleNamespace(
            range_constraints={s: SimpleNamespace(lower=low, upper=high) for s, (low, high) in (fixed or {}).items()},
        )
        return SimpleNamespace(model=parsed(GRAPH), exported_program=program)

    monkeypatch.setattr(torch.onnx, "export", export)
    return capture(model or Two(outputs), inputs or INPUTS, **arguments), asked


@pytest.mark.parametrize(
    ("outputs", "wanted"),
    [
        ({"sum": ONE, "double": ONE}, ["sum", "double"]),
        ((ONE, ONE), ["output_0", "output_1"]),
        ({"logits": ONE, "states": [ONE], "cache": None, "count": 3}, ["logits", "states_0"]),
        ([ONE, (ONE,)], ["output_0", "output_1_0"]),
    ],
)
def test_outputs_are_called_after_what_the_module_returns(
    outputs: Any, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = captured(monkeypatch, outputs)
    assert names(found.model.graph.outputs) == wanted
    assert (found.with_past, found.notes, found.fixed_dims) == (False, [], {})


@pytest.mark.parametrize(("declared", "wanted"), [(["p", "q"], ["p", "q"]), (["p"], ["output_0", "output_1"])])
def test_outputs_may_be_named_by_the_module(
    declared: list[str], wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Two()
    model.output_names = declared  # type: ignore[assignment]
    found, _ = captured(monkeypatch, model=model)
    assert names(found.model.graph.outputs) == wanted


def test_dynamic_dims_have_names_that_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = captured(monkeypatch)
    assert dims(found.model.graph.inputs) == {"x": ["x_dim_0", "x_dim_1"], "y": ["x_dim_0", "x_dim_1"]}
    assert dims(found.model.graph[0].outputs) == {"output_0": ["x_dim_0", "x_dim_1"]}


def test_a_dim_that_the_model_fixes_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = captured(monkeypatch, fixed={"s0": (2, 100), "s1": (3, 3)})
    assert found.fixed_dims == {"s1": "3"}
    assert dims(found.model.graph.inputs) == {"x": ["x_dim_0", 3], "y": ["x_dim_0", 3]}


AUTO = torch.export.Dim.AUTO


@pytest.mark.parametrize(
    ("dynamic", "shapes"),
    [
        (True, {"x": {0: AUTO, 1: AUTO}, "y": {0: AUTO, 1: AUTO}}),
        (False, None),
        ({"x": {0: AUTO}, "y": None}, {"x": {0: AUTO}, "y": None}),
    ],
)
def test_what_the_exporter_is_asked_for(dynamic: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = captured(monkeypatch, dynamic=dynamic, opset=23)
    assert asked["dynamic_shapes"] == shapes
    assert (asked["opset_version"], asked["dynamo"], sorted(asked["kwargs"])) == (20, True, ["x", "y"])


def test_dims_of_inputs_inside_of_others_are_dynamic_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"x": [(torch.ones(2, 3), 7)], "y": {"deep": torch.ones(2)}, "flag": True}
    found, asked = captured(monkeypatch, (ONE, ONE), inputs=inputs)
    assert asked["dynamic_shapes"] == {"x_0_0": {0: AUTO, 1: AUTO}, "y_deep": {0: AUTO}}
    assert names(found.model.graph.inputs) == ["x_0_0", "y_deep"]


def test_opsets_of_the_capture() -> None:
    assert [capture_opset(opset) for opset in (None, 18, 20, 21, 23)] == [20, 18, 20, 20, 20]


def failing(error: Exception) -> Callable[..., Any]:
    def export(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the outer text") from error

    return export


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ValueError("first line\nsecond"),
            r"Two could not be captured by torch's exporter at capture/test_capture\.py:\d+: first line\. Try other",
        ),
        (ValueError("Complex32 is not here"), r"uses complex numbers"),
        (ValueError("no lowering of grouped_mm"), r'set_experts_implementation\("batched_mm"\)'),
        (ValueError(""), r"exporter at capture/test_capture\.py:\d+: the outer text\."),
        (ValueError("x" * 1000), r"exporter at capture/test_capture\.py:\d+: x{400}\. "),
    ],
)
def test_upstreams_errors_are_told_by_their_cause(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", failing(error))
    with pytest.raises(UnsupportedError, match=message) as caught:
        capture(Two(), INPUTS)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UsageError])
def test_our_own_errors_and_interrupts_pass(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*_: Any, **__: Any) -> Any:
        raise kind("ours")

    monkeypatch.setattr(torch.onnx, "export", export)
    with pytest.raises(kind, match="ours"):
        capture(Two(), INPUTS)


def test_an_exporter_that_returns_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    with pytest.raises(UnsupportedError, match=r"torch\.onnx\.export returned nothing for Two"):
        capture(Two(), INPUTS)


def test_upstream_is_kept_quiet_and_logging_is_given_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export(*_: Any, **__: Any) -> Any:
        print("noise")
        logging.getLogger("upstream").warning("noise")
        warnings.warn("noise", stacklevel=1)
        return SimpleNamespace(model=parsed("g (float[2] x) => (float[2] y) { y = Neg (x) }"), exported_program=None)

    monkeypatch.setattr(torch.onnx, "export", export)
    before = logging.root.manager.disable
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capture(Two(), INPUTS)
    assert caught == []
    assert capsys.readouterr() == ("", "")
    assert logging.root.manager.disable == before


def test_no_cache_without_transformers() -> None:
    with pytest.raises(UnsupportedError, match=r"Two is not a transformers model.*Omit --with-past"):
        capture(Two(), {}, with_past=True)


def test_is_pretrained() -> None:
    assert (is_pretrained(Llama()), is_pretrained(Two())) == (True, False)


def test_detached_inputs_may_be_changed() -> None:
    given = {"x": torch.zeros(2), "deep": [torch.zeros(2)]}
    copy = detached(given)
    copy["x"] += 1
    copy["deep"][0] += 1
    assert (given["x"].tolist(), given["deep"][0].tolist()) == ([0, 0], [0, 0])


# transformers ---------------------------------------------------------------------------------------------------------


class Exporter:
    """Gives back a graph and remembers what it was asked for."""

    def __init__(self, program: ir.Model) -> None:
        self.program = program
        self.asked: dict[str, Any] = {}

    def export(self, model: nn.Module, sample: dict[str, Any], config: Any) -> Any:
        self.asked = {"sample": sample, **vars(config)}
        return SimpleNamespace(program=self.program)


def stand_in(monkeypatch: pytest.MonkeyPatch, program: ir.Model) -> Exporter:
    """An exporter in the place of transformers'."""
    exporter = Exporter(program)
    monkeypatch.setattr(module, "_transformers_exporter", lambda: (exporter, lambda **kept: SimpleNamespace(**kept)))
    return exporter


def graph_of(text: str, renamed: dict[str, str]) -> ir.Model:
    """A graph, whose values get names that the text form does not have."""
    program = parsed(text)
    for graph_values in (program.graph.inputs, [output for node in program.graph for output in node.outputs]):
        for value in graph_values:
            value.name = renamed.get(str(value.name), value.name)
    return program


def exported(
    monkeypatch: pytest.MonkeyPatch, text: str, renamed: dict[str, str] | None = None,
    step: dict[str, Any] | None = None, **arguments: Any,
) -> tuple[Capture, Exporter]:  # fmt: skip
    """A transformers model captured as this graph; `renamed` gives values names that the text form does not have."""
    exporter = stand_in(monkeypatch, graph_of(text, renamed or {}))
    if step is not None:
        monkeypatch.setattr(module, "_decode_step", lambda model, inputs: (model, step))
    found = capture(Llama(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}, **arguments)
    return found, exporter


TOKENS = "int64[s0, s1] input_ids, int64[s0, s1] attention_mask"


def test_without_a_cache_its_outputs_go_and_so_do_their_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, exporter = exported(
        monkeypatch, f"g ({TOKENS}) => (int64[s0, s1] logits, int64[s0, s1] k) {{ logits = Neg (input_ids)"
        "  k = Abs (attention_mask) }", {"k": "past_key_values.0.key"}, opset=23,
    )  # fmt: skip
    assert names(found.model.graph.outputs) == ["logits"]
    assert [node.op_type for node in found.model.graph] == ["Neg"]
    assert exporter.asked["sample"].keys() == {"input_ids", "use_cache"}
    assert exporter.asked["sample"]["use_cache"] is False
    assert (exporter.asked["opset_version"], exporter.asked["dynamic"], exporter.asked["dynamic_shapes"]) == (
        20,
        True,
        None,
    )
    assert not found.with_past


def test_dims_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = exported(
        monkeypatch, f"g ({TOKENS}, int64[s0, s2] decoder_input_ids) => (int64[s0, s1] y) {{ y = Neg (input_ids) }}"
    )
    assert dims(found.model.graph.inputs) == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"],
        "decoder_input_ids": ["batch", "decoder_sequence"],
    }  # fmt: skip


CACHED = (
    "g (int64[s0, s1] input_ids, int64[s0, s2] attention_mask, float[s0, s4, s3, s5] pk) => (int64[s0, s1] logits, "
    "float[s0, 2, t, 8] k) { logits = Neg (input_ids)  k = Concat <axis = 2> (pk, pk) }"
)
CACHE_NAMES = {"pk": "input.past_key_values.layers.0.keys", "k": "output.past_key_values.layers.0.keys"}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_cache_is_named_as_runtimes_expect_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = {key: text.replace("past_key_values", name) for key, text in CACHE_NAMES.items()}
    found, exporter = exported(monkeypatch, CACHED, renamed, {"input_ids": 1}, with_past=True)
    assert found.with_past
    assert exporter.asked["sample"] == {"input_ids": 1}
    assert names(found.model.graph.inputs) == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert names(found.model.graph.outputs) == ["logits", "present.0.key"]


def test_dims_of_a_cache_have_names_or_the_number_that_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = exported(monkeypatch, CACHED, CACHE_NAMES, {"input_ids": 1}, with_past=True)
    assert dims(found.model.graph.inputs) == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total_sequence"],
        "past_key_values.0.key": ["batch", 2, "past_sequence", 8],
    }  # fmt: skip


def test_a_scalar_of_the_cache_becomes_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [SimpleNamespace(keys=torch.zeros(1, 2, 3, 8), window=torch.tensor(16))]
    step = {"cache": SimpleNamespace(layers=layers), "kept": {"text": "text"}}
    given = "int64[s0, s1] input_ids, int64[1] a, int64[1] b, int64[1] c, float[s0, 2, s4, 8] pk"
    by_name = {
        "a": "input.cache.layers.0.window", "b": "kept.text", "c": "kept.7",
        "pk": "input.cache.layers.0.keys", "k": "output.cache.layers.0.keys",
    }  # fmt: skip
    program = graph_of(
        f"g ({given}) => (int64[s0, s1] y, float[s0, 2, t, 8] k) {{ y = Add (input_ids, a)  k = Abs (pk) }}", by_name
    )
    for value in program.graph.inputs[1:4]:
        value.shape = ir.Shape([])
    stand_in(monkeypatch, program)
    monkeypatch.setattr(module, "_decode_step", lambda model, inputs: (model, step))
    found = capture(Llama(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}, with_past=True)
    assert names(found.model.graph.inputs) == ["input_ids", "kept.text", "kept.7", "past_key_values.0.key"]
    constant = found.model.graph.initializers[by_name["a"]].const_value
    assert constant is not None
    assert int(constant.numpy()) == 16


@pytest.mark.parametrize(
    ("renamed", "lost"),
    [
        ({**CACHE_NAMES, "attention_mask": "past_key_values.layers.1.recurrent_states.1"}, r"1.recurrent_state.1"),
        ({**CACHE_NAMES, "logits": "output.cache.layers.0.conv_states.0"}, "0.conv_state"),
    ],
    ids=["a state goes in only", "comes out only"],
)
def test_a_tensor_of_the_cache_that_is_not_in_both_is_refused(
    renamed: dict[str, str], lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = f"Llama: expected every tensor of the cache as an input and as an output, got {re.escape(lost)} as one"
    with pytest.raises(UnsupportedError, match=message):
        exported(monkeypatch, CACHED, renamed, {"input_ids": 1}, with_past=True)


def test_a_model_that_returns_no_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="Llama returns no cache, so it keeps its state in its modules"):
        exported(monkeypatch, CACHED, {"pk": CACHE_NAMES["pk"], "k": "other"}, {"input_ids": 1}, with_past=True)


def test_a_mask_that_became_infinite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "g (double[s0, s1] m) => (double[s0, s1] y) <double low = {1.0}> { y = Mul (m, low) }"
    program = parsed(text)
    program.graph.initializers["low"].const_value = ir.tensor(float("-inf"), dtype=ir.DataType.DOUBLE, name="low")
    exporter = Exporter(program)
    monkeypatch.setattr(
        module, "_transformers_exporter", lambda: (exporter, lambda **options: SimpleNamespace(**options))
    )
    with pytest.raises(UnsupportedError, match=r"Llama in float64: .*attention mask as infinity.*Export in float32"):
        capture(Llama(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)})


class Decoder(PreTrainedModel):
    config = SimpleNamespace(is_encoder_decoder=False)

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        """Its rows do not depend on each other, unless `mixes`."""
        lengths = more["attention_mask"].sum(1, keepdim=True)
        shown = lengths.sum(0, keepdim=True).expand_as(lengths) if self.mixes else input_ids
        return SimpleNamespace(logits=shown[..., None].float())

    mixes = False


@pytest.fixture
def decode_step(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What transformers makes of a model's decode step, and under `asked` what it was given."""
    step: dict[str, Any] = {"asked": {}}

    def decompose(model: nn.Module, sample: dict[str, Any], multi_token_decode: bool) -> dict[str, Any]:
        step["asked"] = {"sample": sample, "multi_token_decode": multi_token_decode}
        return {"decode": (model, {key: value for key, value in step.items() if key != "asked"})}

    utils = SimpleNamespace(decompose_prefill_decode=decompose, apply_patches=lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "transformers.exporters.utils", utils)  # type: ignore[arg-type]
    stand_in(monkeypatch, graph_of(CACHED, CACHE_NAMES))
    return step


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Llama, None), (Llama, SimpleNamespace()), (Decoder, SimpleNamespace(is_encoder_decoder=True))],
)
def test_no_cache_for_what_is_no_decoder(kind: type[nn.Module], config: Any, decode_step: dict[str, Any]) -> None:
    model = kind()
    model.config = config
    decode_step["past_key_values"] = SimpleNamespace(layers=[])
    with pytest.raises(UnsupportedError, match=r"is not a decoder with a KV cache of transformers"):
        capture(model, {"input_ids": torch.zeros(2, 9)}, with_past=True)


def test_a_decoder_has_a_cache(decode_step: dict[str, Any]) -> None:
    decode_step["past_key_values"] = SimpleNamespace(layers=[])
    assert capture(Decoder(), {"input_ids": torch.zeros(2, 9)}, with_past=True).with_past


def test_a_graph_without_cache_inputs_has_no_cache(
    decode_step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, parsed("g (int64[s0, s1] input_ids) => (int64[s0, s1] y) { y = Neg (input_ids) }"))
    message = r"^Decoder has no cache that transformers' exporter captures\. Omit --with-past\.$"
    with pytest.raises(UnsupportedError, match=message):
        capture(Decoder(), {"input_ids": torch.zeros(2, 9)}, with_past=True)


def test_a_step_without_a_mask_gets_one(decode_step: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Masked(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids, attention_mask=attention_mask)

    decode_step["input_ids"] = torch.zeros(2, 3, dtype=torch.int64)
    exporter = stand_in(monkeypatch, graph_of(CACHED, CACHE_NAMES))
    mask = torch.ones(2, 9, dtype=torch.int64)
    capture(Masked(), {"input_ids": torch.zeros(2, 9), "attention_mask": mask}, with_past=True)
    given = exporter.asked["sample"]["attention_mask"]
    assert (given.shape, int(given.sum()), int(given[0, 0])) == ((2, 12), 23, 0)


def test_a_mask_of_ones_gets_one_padded_position_so_that_it_stays_an_input(decode_step: dict[str, Any]) -> None:
    decode_step["past_key_values"] = SimpleNamespace(layers=[])
    mask = torch.ones(2, 9, dtype=torch.int64)
    capture(Decoder(), {"input_ids": torch.zeros(2, 9), "attention_mask": mask}, with_past=True)
    given = decode_step["asked"]["sample"]["attention_mask"]
    assert (int(given.sum()), int(given[0, 0]), int(mask.sum())) == (17, 0, 18)
    assert decode_step["asked"]["multi_token_decode"] is True


def test_a_model_whose_rows_depend_on_the_padding_of_others_is_refused(decode_step: dict[str, Any]) -> None:
    model = Decoder()
    model.mixes = True
    ids, mask = torch.zeros(2, 9), torch.ones(2, 9, dtype=torch.int64)
    with pytest.raises(
        UnsupportedError, match=r"Decoder: padding in one row changes the logits of another by 1 of 36,"
    ):
        capture(model, {"input_ids": ids, "attention_mask": mask}, with_past=True)
    assert decode_step["asked"] == {}


def test_a_missing_exporter_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters.exporter_onnx", None)
    with pytest.raises(
        EnvironmentMissingError,
        match=r'transformers [\d.]+ cannot be imported .*pip install --upgrade "rmsnorm-deploy\[hf\]"',
    ):
        capture(Llama(), {"input_ids": torch.zeros(2, 9, dtype=torch.int64)})
