"""Modules in, named arrays out, and the module as it was before."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from rmsnorm_deploy.models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.runners.base import Runner
from rmsnorm_deploy.runtime.runners.torch import TorchRunner, to_numpy, to_torch

X = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 0.5, 0.25, 0.1]))
        self.dropout = nn.Dropout(0.9)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.dropout(x * self.weight)
        return y if bias is None else y + bias


class Returns(nn.Module):
    """Gives back what it was built with."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> Any:
        return self.result


class DynamicCache:
    def __init__(self) -> None:
        self.layers = [SimpleNamespace(keys=torch.zeros(1, 2), values=torch.ones(1, 2))]


def test_it_is_a_runner() -> None:
    assert isinstance(TorchRunner(Scale()), Runner)


def test_a_forward_pass_by_keyword() -> None:
    with TorchRunner(Scale()) as runner:
        plain = runner.run({"x": X})
        biased = runner.run({"bias": np.ones(4, np.float32), "x": X})
        assert [info.name for info in runner.inputs()] == ["x"]
        assert [(i.name, i.dtype, i.shape) for i in runner.outputs()] == [("output", "float32", (1, 4))]
    expected = X * np.array([1.0, 0.5, 0.25, 0.1], np.float32)
    assert list(plain) == ["output"]
    assert np.array_equal(plain["output"], expected)
    assert np.array_equal(biased["output"], expected + 1)


def test_training_flags_come_back_and_parameters_stay() -> None:
    model = Scale().train()
    model.dropout.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with TorchRunner(model) as runner:
        runner.run({"x": X})
        assert not model.training
        model.train()
        # Dropout would show.
        assert np.array_equal(runner.run({"x": X})["output"], X * before["weight"].numpy())
    assert model.training
    assert not model.dropout.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.weight.grad is None


def test_float64_runs_in_a_copy() -> None:
    model = Scale().half().train()
    with TorchRunner(model, dtype=torch.float64) as runner:
        output = runner.run({"x": X.astype(np.float16)})["output"]
        assert model.training
        assert runner.provenance()["parameter_dtypes"] == ["float64"]
    assert output.dtype == np.float64
    assert np.array_equal(output, X.astype(np.float64) * np.array([1.0, 0.5, 0.25, 0.1], np.float16).astype(np.float64))
    assert model.weight.dtype == torch.float16


def test_dtype_by_name_leaves_integers_alone() -> None:
    embedding = nn.Embedding(5, 2)
    with TorchRunner(embedding, dtype="float64", input_names=["ids"]) as runner:
        output = runner.run({"ids": np.array([4, 0])})["output"]
    assert output.dtype == np.float64
    assert np.array_equal(output, embedding.weight.detach().double().numpy()[[4, 0]])


def test_bfloat16_goes_through_bit_for_bit() -> None:
    bits = np.arange(0, 2**16, 257, dtype=np.uint16)
    array = bits.view(ml_dtypes.bfloat16)
    assert np.array_equal(to_numpy(to_torch(array)).view(np.uint16), bits)
    with TorchRunner(nn.Identity()) as runner:
        output = runner.run({"input": array.reshape(16, -1).T})["output"]
    assert output.dtype == ml_dtypes.bfloat16
    assert np.array_equal(output.view(np.uint16), bits.reshape(16, -1).T)
    scalar = to_numpy(to_torch(np.array(1.5, ml_dtypes.bfloat16)))
    assert (scalar.shape, float(scalar)) == ((), 1.5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8, np.bool_])
def test_other_dtypes_go_through(dtype: Any) -> None:
    array = np.array([[0, 1], [2, 3]]).astype(dtype)
    assert to_numpy(to_torch(array)).dtype == dtype
    assert np.array_equal(to_numpy(to_torch(array[::-1])), array[::-1])


def test_results_and_feeds_are_not_shared_with_the_module() -> None:
    model = Returns(torch.zeros(3))

    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    feed = X.copy()
    feed.flags.writeable = False
    with TorchRunner(InPlace()) as runner:
        assert np.array_equal(runner.run({"x": feed})["output"], X + 1)
    assert np.array_equal(feed, X)
    with TorchRunner(model) as runner:
        runner.run({"x": X})["output"][:] = 7
    assert torch.equal(model.result, torch.zeros(3))


A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (A, ["output"]),
        ((A, None, B), ["output_0", "output_2"]),
        ([A, (B, C)], ["output_0", "output_1_0", "output_1_1"]),
        (OrderedDict(logits=A, loss=None, hidden_states=(B, C)), ["logits", "hidden_states_0", "hidden_states_1"]),
        ({"logits": A, "past_key_values": DynamicCache()}, ["logits"]),
        ({"logits": A, "past_key_values": ((B, C),)}, ["logits"]),
        ({"out": {"a": A, "b": [B]}}, ["out_a", "out_b_0"]),
        (None, []),
    ],
)
def test_names_of_outputs(result: Any, names: list[str]) -> None:
    with TorchRunner(Returns(result)) as runner:
        assert list(runner.run({"x": X})) == names


def test_caches_when_asked() -> None:
    for cache, names in (
        (DynamicCache(), ["past_key_values.layers.0.keys", "past_key_values.layers.0.values"]),
        (((B, C),), ["past_key_values_0_0", "past_key_values_0_1"]),
    ):
        with TorchRunner(Returns({"logits": A, "past_key_values": cache}), include_cache=True) as runner:
            assert list(runner.run({"x": X})) == ["logits", *names]


def test_output_names() -> None:
    with TorchRunner(Returns((A, None, B)), output_names=["first", "second"]) as runner:
        assert [info.name for info in runner.outputs()] == ["first", "second"]
        assert [array.shape for array in runner.run({"x": X}).values()] == [(1,), (2,)]
    with TorchRunner(Returns((A, B)), output_names=["only"]) as runner, pytest.raises(UsageError, match="returned 2"):
        runner.run({"x": X})


def test_input_names_by_keyword_or_by_position() -> None:
    class Subtract(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    one, two = np.ones(1, np.float32), np.full(1, 2.0, np.float32)
    with TorchRunner(Subtract(), input_names=["b", "a"]) as runner:
        assert runner.run({"a": one, "b": two})["output"] == -1
    with TorchRunner(Subtract(), input_names=["left", "right"]) as runner:
        assert [info.name for info in runner.inputs()] == ["left", "right"]
        assert runner.run({"right": two, "left": one})["output"] == -1
    with pytest.raises(UsageError, match="b is the name of another parameter"):
        TorchRunner(Subtract(), input_names=["b", "c"])
    with pytest.raises(UsageError, match="expected at most 2 inputs, got 3"):
        TorchRunner(Subtract(), input_names=["x", "y", "z"])


def test_keyword_arguments_of_any_name() -> None:
    class Any_(nn.Module):
        def forward(self, x: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
            return x + others["shift"]

    with TorchRunner(Any_()) as runner:
        assert np.array_equal(runner.run({"x": X, "shift": X})["output"], 2 * X)


def test_refusals() -> None:
    with pytest.raises(UsageError, match=r"expected an nn\.Module, got str"):
        TorchRunner("model")  # type: ignore[arg-type]
    for wrong in ("int64", "float99"):
        with pytest.raises(UsageError, match=wrong):
            TorchRunner(Scale(), dtype=wrong)
    with pytest.raises(UsageError, match="is not a device"):
        TorchRunner(Scale(), device="warp")
    with TorchRunner(Scale()) as runner:
        with pytest.raises(UsageError, match="missing: x"):
            runner.run({})
        with pytest.raises(UsageError, match="unexpected: y"):
            runner.run({"x": X, "y": X})
        with pytest.raises(UsageError, match=r"Scale failed on x float32\[3\]"):
            runner.run({"x": np.zeros(3, np.float32)})
    for call in (lambda: runner.run({"x": X}), runner.provenance):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_outputs_that_are_not_tensors_are_refused() -> None:
    with TorchRunner(Returns({"logits": A, "note": object()})) as runner:
        with pytest.raises(UnsupportedError, match=r"output note: expected a tensor.*, got object") as caught:
            runner.run({"x": X})
        assert caught.value.exit_code == 3
    eighth = Returns(torch.zeros(2, dtype=torch.float8_e4m3fn))
    with TorchRunner(eighth) as runner, pytest.raises(UnsupportedError, match="float8_e4m3fn"):
        runner.run({"x": X})


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    model = Scale()
    model.extra = model.weight * 2  # neither a leaf nor a parameter: PyTorch refuses to copy it
    with pytest.raises(UsageError, match="Scale cannot be copied"):
        TorchRunner(model, dtype="float64")


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentMissingError, match="finds no CUDA device") as caught:
        TorchRunner(Scale(), device="cuda")
    assert caught.value.exit_code == 4


def test_provenance() -> None:
    with TorchRunner(Scale()) as runner:
        record = runner.provenance()
    assert record["torch"] == torch.__version__
    assert (record["model"], record["device"], record["parameters"]) == ("Scale", "cpu", 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and the CUDA build of torch")
def test_a_copy_runs_on_the_gpu() -> None:
    model = Scale()
    with TorchRunner(model, device="cuda", dtype="float16") as runner:
        output = runner.run({"x": X})["output"]
        assert runner.provenance()["device_name"]
    assert np.array_equal(output, X.astype(np.float16) * np.array([1.0, 0.5, 0.25, 0.1], np.float16))
    assert model.weight.device.type == "cpu"


# Several calls ----------------------------------------------------------------------------------------------------


class Sums(nn.Module):
    """Adds each token to the sum of those before, which is its cache; it counts the tokens of each call."""

    def __init__(self, cache: str | None = "past_key_values") -> None:
        super().__init__()
        self.cache = cache
        self.calls: list[tuple[int, int]] = []

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False, **past: torch.Tensor
    ) -> Any:
        self.calls.append((input_ids.shape[1], attention_mask.shape[1]))
        y = input_ids.cumsum(1).float() + sum(past.values())
        found = OrderedDict(y=y, count=torch.tensor(float(input_ids.shape[1])))
        result = type("Result", (OrderedDict,), {})(found)
        if use_cache and self.cache is not None:
            setattr(result, self.cache, y[:, -1:])
        return result


TOKENS = np.arange(1, 8).reshape(1, 7)
CALLS = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}


@pytest.mark.parametrize("cache", ["past_key_values", "cache"])
def test_a_run_in_calls_joins_what_the_calls_return(cache: str) -> None:
    model = Sums(cache)
    with TorchRunner(model) as runner:
        found = runner.run_calls(CALLS, [3, 4, 7])
        assert model.calls == [(3, 3), (1, 4), (3, 7)]
        assert found["y"].tolist() == [[1.0, 3.0, 6.0, 10.0, 15.0, 21.0, 28.0]]
        assert float(found["count"]) == 3.0  # a number per call: that of the last one
        assert np.array_equal(found["y"], runner.run(CALLS)["y"])


def test_one_call_needs_no_cache() -> None:
    with TorchRunner(Sums(None)) as runner:
        assert runner.run_calls(CALLS, [7])["y"][0, -1] == 28.0


def test_several_calls_of_a_model_without_a_cache() -> None:
    with (
        TorchRunner(Sums(None)) as runner,
        pytest.raises(UsageError, match="Sums returns no past_key_values, so it cannot run in several calls"),
    ):
        runner.run_calls(CALLS, [3, 7])
