"""A decoder's cache stays in ONNX Runtime's values from one step to the next."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from rmsnorm_deploy import export_model
from rmsnorm_deploy.export.graph.cache_names import is_past
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.runtime.runners import onnxruntime as module
from rmsnorm_deploy.runtime.runners.decoding import HostDecoding, open_decoding
from rmsnorm_deploy.runtime.runners.onnxruntime import OrtRunner
from rmsnorm_deploy.runtime.runners.ort_decoding import OrtDecoding
from tests.helpers.models.families import build
from tests.helpers.runtime.feeds import step_feeds


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    export_model(build("gpt_oss"), folder / "out", target="ort", with_past=True)
    return folder / "out" / "model.onnx"


@pytest.mark.parametrize("io_binding", [False, True])
def test_the_logits_are_those_of_a_cache_of_arrays(path, io_binding):
    with OrtRunner(path, io_binding=io_binding) as runner:
        own, host = open_decoding(runner), HostDecoding(runner)
        assert isinstance(own, OrtDecoding)
        for _ in range(2):
            read = 0
            for tokens in (6, 1, 1, 3, 1):
                read += tokens
                feeds = step_feeds(runner, tokens, read)
                got = own.step(feeds)
                assert got.shape == (2, 97)
                assert np.array_equal(got, host.step(feeds))
            own.restart()
            host.restart()


def test_only_the_logits_are_copied(path):
    with OrtRunner(path) as runner:
        decoding = runner.decoding()
        decoding.step(step_feeds(runner, 4, 4))
        with (
            mock.patch.object(module, "_to_value", wraps=module._to_value) as given,
            mock.patch.object(decoding, "_view", wraps=decoding._view) as taken,
        ):
            decoding.step(step_feeds(runner, 1, 5))
        assert taken.call_count == 1
        assert given.call_count == len([info for info in runner.inputs() if not is_past(info.name)])


def test_a_failed_step_can_be_repeated(path):
    with OrtRunner(path) as runner:
        decoding = runner.decoding()
        decoding.step(step_feeds(runner, 4, 4))
        with pytest.raises(UsageError, match="onnxruntime failed"):
            decoding.step(step_feeds(runner, 1, 5, batch=3))
        again = HostDecoding(runner)
        again.step(step_feeds(runner, 4, 4))
        assert np.array_equal(decoding.step(step_feeds(runner, 1, 5)), again.step(step_feeds(runner, 1, 5)))


def test_a_closed_runner_has_no_steps(path):
    runner = OrtRunner(path)
    runner.close()
    with pytest.raises(UsageError, match="the runner is closed"):
        runner.decoding()
