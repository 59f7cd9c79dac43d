"""Engines run by TensorRT itself, on a GPU: `pytest -m tensorrt`. Each test says what it needs where it is skipped."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rmsnorm_deploy.runtime.engines.api import FLAVORS, RUNTIMES, flavor_of, is_installed
from rmsnorm_deploy.runtime.generation.api import generate
from rmsnorm_deploy.runtime.inputs.synthetic import make_feeds
from rmsnorm_deploy.runtime.runners.decoding import HostDecoding
from rmsnorm_deploy.runtime.runners.open import open_runner
from rmsnorm_deploy.runtime.runners.tensorrt import TensorRTRunner
from rmsnorm_deploy.runtime.validation.api import validate
from tests.helpers.plugins.gpu_memory import DEVICE, needs_gpu
from tests.helpers.tensorrt.engines import DecoderEngine, decoder_engine_in

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt, needs_gpu]


@pytest.fixture(scope="module", params=[(name, target) for name in RUNTIMES for target in ("standard", "plugin")])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DecoderEngine:
    runtime, target = request.param
    if not is_installed(runtime):
        pytest.skip(f"needs {FLAVORS[runtime].title}: {FLAVORS[runtime].install}")
    if torch.version.cuda is None or not torch.cuda.is_available():
        pytest.skip("needs PyTorch for CUDA and a GPU that it can use")
    known = flavor_of(runtime).architectures
    assert DEVICE is not None
    if known and DEVICE[1] not in known:
        pytest.skip(f"needs a GPU that {runtime} supports, such as sm_{known[-1]}; this one is sm_{DEVICE[1]}")
    options: dict[str, Any] = {"runtime": runtime, "target": target}
    if known:
        options["architectures"] = (DEVICE[1],)
    return decoder_engine_in(tmp_path_factory.mktemp(f"{runtime}-{target}"), **options)


def feeds_of(runner: Any, batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    return make_feeds(runner.inputs(), batch, length, seed, vocabulary=90)


def near(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Within what TF32 products may be off."""
    return bool(np.abs(found - wanted).max() <= 2e-2 * np.abs(wanted).max())


def test_the_numbers_are_those_of_the_file(decoder: DecoderEngine) -> None:
    with TensorRTRunner(decoder.engine) as runner, open_runner(decoder.folder / "model.onnx") as onnx:
        for batch, length in ((1, 1), (1, 24), (3, 7)):
            feeds = feeds_of(runner, batch, length, length)
            found, wanted = runner.run(feeds), onnx.run(feeds)
            assert all(near(found[name], wanted[name]) for name in wanted)


def test_tensors_stay_where_they_are(decoder: DecoderEngine) -> None:
    with TensorRTRunner(decoder.engine) as runner:
        feeds = feeds_of(runner, 2, 5, 0)
        tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        memory = torch.zeros(2 * 5 * 97, device="cuda")
        found = runner.run_tensors(
            tensors,
            lambda name, shape, dtype: (
                memory.view(shape) if name == "logits" else torch.empty(shape, dtype=dtype, device="cuda")
            ),
        )
        assert found["logits"].data_ptr() == memory.data_ptr()
        assert np.array_equal(memory.cpu().numpy().reshape(2, 5, 97), runner.run(feeds)["logits"])


def test_graphs_and_contexts_change_no_bits(decoder: DecoderEngine) -> None:
    with TensorRTRunner(decoder.engine) as runner:
        requests = [feeds_of(runner, 1 + n % 3, (3, 8, 8, 8)[n % 4], n) for n in range(64)]
        wanted = [runner.run(feeds)["logits"] for feeds in requests]
    with TensorRTRunner(decoder.engine, contexts=4) as runner, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda feeds: runner.run(feeds)["logits"], requests))
        assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))
    with TensorRTRunner(decoder.engine, cuda_graphs=True) as runner:
        for _ in range(3):
            assert all(
                np.array_equal(runner.run(f)["logits"], w) for f, w in zip(requests[:9], wanted[:9], strict=True)
            )
        for feeds, expected in list(zip(requests, wanted, strict=True))[1::12]:
            assert all(np.array_equal(runner.run(feeds)["logits"], expected) for _ in range(4))


def test_the_cache_stays_on_the_gpu(decoder: DecoderEngine) -> None:
    with TensorRTRunner(decoder.engine) as runner, open_runner(decoder.folder / "model.onnx") as onnx:
        device, host, total = runner.decoding(), HostDecoding(onnx), 0
        used = []
        for length in (6, *[1] * 200):
            total += length
            feeds = feeds_of(runner, 1, length, total)
            feeds["attention_mask"] = np.ones((1, total), np.int64)
            feeds["position_ids"] = np.arange(total - length, total)[None]
            assert near(device.step(feeds), host.step(feeds))
            used.append(torch.cuda.memory_allocated())
        assert max(used[100:]) <= max(used[:100]) + 4 * 2 * 2 * (2 * 256 * 8 * 4)


def test_tokens_and_verdict_are_pytorchs(decoder: DecoderEngine) -> None:
    prompt = [3, 5, 7, 11]
    with torch.no_grad():
        ids = decoder.model.generate(torch.tensor([prompt]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert generate(decoder.engine, prompt, max_new_tokens=16).ids == ids[0, len(prompt) :].tolist()
    assert validate(decoder.engine, decoder.model).verdict == "pass"
    deep = validate(decoder.engine, decoder.model, deep=True, shapes=[(1, 5)])
    assert (deep.verdict, len(deep.norms)) == ("pass", 9)


def test_an_engine_that_was_changed_or_is_anothers(decoder: DecoderEngine, tmp_path: Path) -> None:
    place = tmp_path / "other.engine"
    place.write_bytes(b"this is not an engine")
    with pytest.raises(Exception, match=r"other.engine"):
        TensorRTRunner(place, runtime=open_engine_runtime(decoder))


def open_engine_runtime(decoder: DecoderEngine) -> str:
    with TensorRTRunner(decoder.engine) as runner:
        return {"TensorRT": "tensorrt", "TensorRT-RTX": "rtx"}[runner.provenance()["product"]]
