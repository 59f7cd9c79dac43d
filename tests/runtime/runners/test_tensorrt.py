"""Engines are run: their numbers, profiles, contexts, streams, graphs and errors, with a stand-in of the runtime.

The stand-in computes with ONNX Runtime from the file that the engine was built from; what runs above it is ours.
"""

from __future__ import annotations

import gc
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy.export.graph.cache_names import present_to_past
from rmsnorm_deploy.export.onnx_io.owned_files import sha256
from rmsnorm_deploy.models.errors import EnvironmentMissingError, RmsnormDeployError, UnsupportedError, UsageError
from rmsnorm_deploy.runtime.engines import open_engine
from rmsnorm_deploy.runtime.engines.engine_file import record_of
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.base import Runner
from rmsnorm_deploy.runtime.runners.decoding import HostDecoding, open_decoding
from rmsnorm_deploy.runtime.runners.open import open_runner
from rmsnorm_deploy.runtime.runners.tensorrt import TensorRTRunner
from tests.helpers.tensorrt.engines import DecoderEngine
from tests.helpers.tensorrt.stand_in import CudaGraphStrategy, StandIn

Feeds = dict[str, np.ndarray]


def feeds_of(runner: Any, batch: int, length: int, past: int = 0, seed: int = 0) -> Feeds:
    feeds = make_feeds(runner.inputs(), batch, length, seed, vocabulary=90)
    if past:
        rng = np.random.default_rng(seed)
        feeds = {
            name: rng.standard_normal((batch, 2, past, 8), np.float32) if name.startswith("past") else array
            for name, array in feeds.items()
        }
        feeds["attention_mask"] = np.ones((batch, past + length), np.int64)
    return feeds


@pytest.fixture
def expected(decoder_engine: DecoderEngine) -> Any:
    with open_runner(decoder_engine.folder / "model.onnx") as runner:
        yield runner.run


@pytest.mark.parametrize(("batch", "length", "past"), [(1, 1, 0), (1, 24, 0), (3, 7, 0), (2, 1, 9), (1, 4, 1200)])
def test_an_engine_gives_the_numbers_of_its_file(
    stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any, batch: int, length: int, past: int
) -> None:
    with open_runner(decoder_engine.engine) as runner:
        assert isinstance(runner, Runner)
        feeds = feeds_of(runner, batch, length, past)
        results, wanted = runner.run(feeds), expected(feeds)
        assert set(results) == set(wanted)
        assert all(np.array_equal(results[name], wanted[name]) for name in wanted)
        assert list(runner.run(feeds, ["logits"])) == ["logits"]


def test_inputs_have_the_names_of_their_dims(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with open_runner(decoder_engine.engine) as runner:
        known = {info.name: info for info in runner.inputs()}
        assert known["input_ids"].shape == ("batch", "sequence")
        assert known["past_key_values.0.key"].shape == ("batch", 2, "past_sequence", 8)
        assert {info.name for info in runner.outputs()} >= {"logits", "present.1.value"}
        with pytest.raises(UsageError, match=r"batch is 1 in input input_ids"):
            runner.run({**feeds_of(runner, 1, 2), "attention_mask": np.ones((2, 2), np.int64)})
        with pytest.raises(UsageError, match=r"inputs missing: input_ids"):
            runner.run({n: a for n, a in feeds_of(runner, 1, 2).items() if n != "input_ids"})


def test_the_profile_changes_with_the_shapes(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        for length, past in ((8, 0), (1, 8), (1, 9), (20, 0), (1, 20)):
            feeds = feeds_of(runner, 1, length, past)
            assert np.array_equal(runner.run(feeds)["logits"], expected(feeds)["logits"])
        outside = feeds_of(runner, 1, 5, 9)
        with pytest.raises(UsageError, match=r"the nearest, profile 1, takes .*input_ids from 1x1 to 3x4, and got 1x5"):
            runner.run(outside)
        feeds = feeds_of(runner, 1, 3)
        assert np.array_equal(runner.run(feeds)["logits"], expected(feeds)["logits"])  # it goes on


def test_tensors_are_not_copied(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        feeds = feeds_of(runner, 1, 3)
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        memory = torch.zeros(3 * 97)
        runner.run(feeds)
        before = stand_in.device.live()
        results = runner.run_tensors(
            inputs, lambda name, shape, dtype: memory.view(shape) if name == "logits" else torch.empty(shape)
        )
        assert stand_in.device.live() == before
        assert results["logits"].data_ptr() == memory.data_ptr()
        assert np.array_equal(memory.numpy().reshape(1, 3, 97), expected(feeds)["logits"])
        turned = {**inputs, "input_ids": torch.from_numpy(feeds["input_ids"]).t().contiguous().t()}
        assert torch.equal(runner.run_tensors(turned)["logits"], results["logits"])


def test_tensors_that_do_not_match(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        inputs = {name: torch.from_numpy(array) for name, array in feeds_of(runner, 1, 3).items()}
        with pytest.raises(UsageError, match=r"input input_ids: expected dtype torch.int64, got torch.int32"):
            runner.run_tensors({**inputs, "input_ids": inputs["input_ids"].int()})
        with pytest.raises(UsageError, match=r"input input_ids: expected a tensor on cpu, got one on meta"):
            runner.run_tensors({**inputs, "input_ids": inputs["input_ids"].to("meta")})
        with pytest.raises(UsageError, match=r"inputs missing: input_ids; unexpected: ids\. The inputs are: input_ids"):
            runner.run_tensors({"ids" if name == "input_ids" else name: value for name, value in inputs.items()})


def test_an_output_whose_shape_follows_from_values(
    stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any
) -> None:
    stand_in.behavior.value_dependent = {"logits", "present.0.key"}
    with TensorRTRunner(decoder_engine.engine, cuda_graphs=True) as runner:
        feeds = feeds_of(runner, 2, 3)
        for _ in range(4):  # no graph is captured, as its memory is not known before
            results = runner.run(feeds)
            assert all(np.array_equal(results[name], value) for name, value in expected(feeds).items())
        stand_in.device.fail_at_bytes = 2 * 3 * 97 * 4
        with pytest.raises(RmsnormDeployError, match=r"TensorRT failed to run it: .*OutOfMemory \(logits\)") as error:
            runner.run(feeds)
        assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_tensors_on_the_host_stay_there(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    for names in ({"input_ids"}, {"logits"}):
        stand_in.behavior.host = names
        with TensorRTRunner(decoder_engine.engine, cuda_graphs=True) as runner:
            for _ in range(3):
                feeds = feeds_of(runner, 1, 2)
                assert np.array_equal(runner.run(feeds)["logits"], expected(feeds)["logits"])
    assert stand_in.device.captures == 0


def test_an_output_that_shares_memory_with_an_input_is_that_input(
    stand_in: StandIn, decoder_engine: DecoderEngine
) -> None:
    stand_in.behavior.aliases = {"present.0.key": "past_key_values.0.key"}
    with TensorRTRunner(decoder_engine.engine) as runner:
        inputs = {name: torch.from_numpy(array) for name, array in feeds_of(runner, 1, 2).items()}
        results = runner.run_tensors(inputs, lambda _name, shape, dtype: torch.empty(shape, dtype=dtype))
    assert results["present.0.key"].shape == inputs["past_key_values.0.key"].shape
    assert results["present.0.value"].shape == (1, 2, 2, 8)


def test_many_requests_at_once(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    """64 requests over 4 contexts: the results of one by one."""
    stand_in.behavior.seconds = 0.02
    with TensorRTRunner(decoder_engine.engine, contexts=4) as runner:
        requests = [feeds_of(runner, 1 + n % 3, 1 + n % 4, (n % 5) * 3, seed=n) for n in range(64)]
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(runner.run, requests))
        assert 2 <= stand_in.behavior.most_at_once <= 4
        for feeds, found in zip(requests, results, strict=True):
            assert all(np.array_equal(found[name], value) for name, value in expected(feeds).items())


def test_closing_waits_for_runs(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    stand_in.behavior.seconds = 0.3
    runner = TensorRTRunner(decoder_engine.engine, contexts=2)
    feeds, found = feeds_of(runner, 1, 2), []
    thread = threading.Thread(target=lambda: found.append(runner.run(feeds)))
    thread.start()
    while not stand_in.behavior.executions:
        thread.join(0.01)
    runner.close()
    runner.close()
    thread.join()
    assert found
    assert stand_in.behavior.at_once == 0
    for use in (lambda: runner.run(feeds), runner.provenance, runner.decoding):
        with pytest.raises(UsageError, match=r"the runner is closed"):
            use()


def test_a_failed_run_leaves_no_memory(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        feeds = feeds_of(runner, 3, 20)
        runner.run(feeds)
        before = stand_in.device.live()
        stand_in.behavior.fail_at = stand_in.behavior.executions + 1
        with pytest.raises(RmsnormDeployError, match=r"model.engine: TensorRT failed to run it: .*Cask"):
            runner.run(feeds)
        gc.collect()
        assert stand_in.device.live() <= before
        assert np.array_equal(runner.run(feeds)["logits"], expected(feeds)["logits"])  # in a new context
        assert stand_in.device.live() <= before


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("set_optimization_profile_async", "TensorRT does not switch to profile 1: .*API Usage Error"),
        ("set_input_shape", "TensorRT refuses an input input_ids of shape 1x1: .*invalid input_ids"),
        ("infer_shapes", "TensorRT cannot infer the shapes of input_ids"),
        ("infer_shapes by an error", r"TensorRT failed on these inputs \(.*inferShapes: Error Code 7"),
        ("set_tensor_address", "TensorRT refuses the address of input_ids: .*null address"),
        ("set_output_allocator", "TensorRT refuses an allocator for logits"),
    ],
)
def test_calls_that_tensorrt_refuses(
    stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any, method: str, message: str
) -> None:
    stand_in.behavior.value_dependent = {"logits"}
    with TensorRTRunner(decoder_engine.engine) as runner:
        feeds = feeds_of(runner, 1, 1, 4)
        stand_in.behavior.refused = {method}
        with pytest.raises(RmsnormDeployError, match=message):
            runner.run(feeds)
        assert np.array_equal(runner.run(feeds)["logits"], expected(feeds)["logits"])


def test_cuda_graphs_replay_the_same_shapes(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    """TensorRT's runs are captured here; see the next test for TensorRT-RTX."""
    del stand_in.module.CudaGraphStrategy  # type: ignore[attr-defined]
    with TensorRTRunner(decoder_engine.engine, cuda_graphs=True) as runner:
        captures = []
        for length, seed in ((5, 0), (5, 1), (5, 2), (5, 3), (6, 0), (5, 4), (5, 5), (5, 6)):
            feeds = feeds_of(runner, 1, length, seed=seed)
            found = runner.run(feeds)
            assert all(np.array_equal(found[name], value) for name, value in expected(feeds).items())
            captures.append(stand_in.device.captures)
        assert captures == [0, 1, 1, 1, 1, 1, 2, 2]
        first, second = (runner.run(feeds_of(runner, 1, 5, seed=seed))["logits"] for seed in (7, 8))
        assert not np.array_equal(first, second)  # each result is the caller's own


def test_tensorrt_rtx_has_graphs_of_its_own(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with TensorRTRunner(decoder_engine.engine, cuda_graphs=True) as runner:
        feeds = feeds_of(runner, 1, 5)
        for _ in range(4):
            runner.run(feeds)
        assert (stand_in.device.captures, stand_in.behavior.graphs) == (0, [CudaGraphStrategy.WHOLE_GRAPH_CAPTURE])
        assert runner.provenance()["cuda_graphs"] is True


# The cache


def test_the_cache_stays_on_the_device(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    """A prompt, and steps: the logits of a loop over arrays."""
    with TensorRTRunner(decoder_engine.engine) as runner:
        decoding = open_decoding(runner)
        assert type(decoding).__name__ == "DeviceDecoding"
        with open_runner(decoder_engine.folder / "model.onnx") as onnx:
            host, past = HostDecoding(onnx), {}
            for length in (6, 1, 1, 3, 1):
                feeds = feeds_of(runner, 2, length, seed=length)
                total = length + next((a.shape[2] for a in past.values()), 0)
                feeds["attention_mask"] = np.ones((2, total), np.int64)
                wanted = expected({**feeds, **past})
                past = present_to_past(wanted)
                assert np.array_equal(decoding.step(feeds), wanted["logits"][:, -1])
                assert np.array_equal(host.step(feeds), wanted["logits"][:, -1])
            host.restart()
            decoding.restart()
            feeds = feeds_of(runner, 2, 6, seed=6)
            assert np.array_equal(decoding.step(feeds), expected(feeds)["logits"][:, -1])
            assert np.array_equal(host.step(feeds), expected(feeds)["logits"][:, -1])


def test_a_failed_step_can_be_repeated(stand_in: StandIn, decoder_engine: DecoderEngine, expected: Any) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        decoding, feeds = runner.decoding(), feeds_of(runner, 1, 6)
        decoding.step(feeds)
        past = present_to_past(expected(feeds))
        step = {**feeds_of(runner, 1, 1), "attention_mask": np.ones((1, 7), np.int64)}
        stand_in.behavior.fail_at = stand_in.behavior.executions + 1
        with pytest.raises(RmsnormDeployError, match="TensorRT failed"):
            decoding.step(step)
        assert np.array_equal(decoding.step(step), expected({**step, **past})["logits"][:, -1])


def test_the_memory_of_a_thousand_steps_is_flat(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with TensorRTRunner(decoder_engine.engine) as runner:
        decoding = runner.decoding()
        decoding.step(feeds_of(runner, 1, 1))
        sizes, made = [], 0
        for step in range(1, 1001):
            feeds = {**feeds_of(runner, 1, 1, seed=step), "attention_mask": np.ones((1, step + 1), np.int64)}
            decoding.step(feeds)
            sizes.append(stand_in.device.live())
            made += sizes[-1] != sizes[-2] if step > 1 else 0
        # Four tensors of [1, 2, 1001, 8] in float32, two buffers each, which have at most twice the size.
        assert max(sizes) <= 4 * 2 * 2 * (2 * 1024 * 8 * 4)
        assert made <= 2 * 4 * 11  # doublings
        assert len(stand_in.device.made) < 100
        decoding.restart()
        gc.collect()
        assert stand_in.device.live() < 4096


# What cannot be opened


def changed(engine: DecoderEngine, folder: Path, **changes: Any) -> Path:
    """A copy of the engine whose record says something else."""
    place = folder / engine.engine.name
    shutil.copy(engine.engine, place)
    record = json.loads(record_of(engine.engine).read_text(encoding="utf-8")) | changes
    record_of(place).write_text(json.dumps(record), encoding="utf-8")
    return place


def test_an_engine_for_another_gpu(stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path) -> None:
    place = changed(decoder_engine, tmp_path, architectures=["sm_86", "sm_120"], gpu="NVIDIA A10")
    message = r"built for sm_86, sm_120 on NVIDIA A10, and this machine's GPU is NVIDIA L4 \(sm_89\)\. Build it for"
    with pytest.raises(UnsupportedError, match=message):
        TensorRTRunner(place)


def test_an_engine_of_another_version(
    monkeypatch: pytest.MonkeyPatch, decoder_engine: DecoderEngine, tmp_path: Path
) -> None:
    StandIn(monkeypatch, "11.4.0.106", "tensorrt")
    runtime = {"name": "tensorrt", "title": "TensorRT", "version": "10.15.1.29"}
    place = changed(decoder_engine, tmp_path, runtime=runtime)
    with pytest.raises(UnsupportedError, match=r"built by TensorRT 10.15.1.29, and 11.4.0.106 is installed here"):
        TensorRTRunner(place)
    options = {"version_compatible": True}
    TensorRTRunner(changed(decoder_engine, tmp_path, runtime=runtime, options=options)).close()
    TensorRTRunner(changed(decoder_engine, tmp_path, runtime={**runtime, "version": "11.4.0.106"})).close()


def test_an_engine_that_tensorrt_cannot_open(stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path) -> None:
    stand_in.behavior.no_engine = True
    with pytest.raises(RmsnormDeployError, match=r"model.engine: TensorRT-RTX cannot open it: .*Serialization"):
        TensorRTRunner(decoder_engine.engine)
    runtime = {"name": "rtx", "title": "TensorRT-RTX", "version": "1.5.0"}
    with pytest.raises(RmsnormDeployError, match=r"cannot open it \(built by 1.5.0, opened by 1\."):
        TensorRTRunner(changed(decoder_engine, tmp_path, runtime=runtime))
    stand_in.behavior.no_engine, stand_in.behavior.invalid = False, "compute capability"
    with pytest.raises(UnsupportedError, match=r"TensorRT-RTX 1\..* cannot run it on NVIDIA L4: compute capability"):
        TensorRTRunner(decoder_engine.engine)
    stand_in.behavior.invalid, stand_in.behavior.no_context = None, True
    with TensorRTRunner(decoder_engine.engine) as runner:
        for _ in range(3):  # every try says the same
            with pytest.raises(RmsnormDeployError, match=r"TensorRT made no execution context"):
                runner.run(feeds_of(runner, 1, 2))


def test_an_engine_that_was_changed(stand_in: StandIn, decoder_engine: DecoderEngine, tmp_path: Path) -> None:
    place = changed(decoder_engine, tmp_path)
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)
    assert sha256(place) != sha256(decoder_engine.engine)
    with pytest.raises(UsageError, match=r"is not the engine that model.engine.json describes: its SHA-256"):
        open_runner(place)


def test_without_a_gpu_an_engine_is_not_opened(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, decoder_engine: DecoderEngine
) -> None:
    monkeypatch.setattr(open_engine, "cuda_device", lambda _index: None)
    with pytest.raises(EnvironmentMissingError, match=r"requires an NVIDIA GPU and its driver, and there is none"):
        TensorRTRunner(decoder_engine.engine)


def test_wrong_arguments(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with pytest.raises(UsageError, match=r"contexts: expected at least 1, got 0"):
        TensorRTRunner(decoder_engine.engine, contexts=0)
    with pytest.raises(UsageError, match=r"is an engine, which runs in the TensorRT that built it; .* got cuda"):
        open_runner(decoder_engine.engine, "cuda")


def test_provenance_says_what_ran(stand_in: StandIn, decoder_engine: DecoderEngine) -> None:
    with TensorRTRunner(decoder_engine.engine, contexts=2) as runner:
        found = runner.provenance()
    assert (found["runner"], found["product"]) == ("tensorrt", "TensorRT-RTX")
    assert found["gpu"] == {"name": "NVIDIA L4", "architecture": "sm_89"}
    assert found["engine"]["sha256"] == sha256(decoder_engine.engine)
    assert found["model"]["sha256"] == sha256(decoder_engine.folder / "model.onnx")
    assert "manifest" not in found["model"]
    assert len(found["norms"]) == 9
    json.dumps(found)
