"""What torch's exporter writes and ONNX Runtime does not take, in another form with the same results."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from rmsnorm_deploy.export.capture.capture import capture


class Squeezes(nn.Module):
    """Squeezes a dim of size 4, which changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, :4].sum(0) * x.new_ones(4)).squeeze(0) + 1


class Chooses(nn.Module):
    """Chooses between booleans."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x > 0.5, x < -0.5).masked_fill(x > 1, False)


@pytest.mark.parametrize("model", [Squeezes(), Chooses()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_runtime_runs_it(model: nn.Module, dynamic: bool) -> None:
    x = torch.randn(64, 4)
    captured = capture(model.eval(), {"x": x}, dynamic=dynamic)
    session = onnxruntime.InferenceSession(ir.to_proto(captured.model).SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], model(x).numpy(), rtol=1e-6, atol=1e-6)
    assert not {"Squeeze", "Where"} & {node.op_type for node in captured.model.graph}
