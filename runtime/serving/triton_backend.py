"""A model in Triton's Python backend (`TritonPythonModel`): each request is one run of a runner of this package.

Triton imports the class from `model.py` of a package, gives `initialize` its configuration, and calls `execute` with
the requests that it joined. Its module `triton_python_backend_utils` exists in its own processes alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...models.errors import RmsnormDeployError
from ..inputs.exported import open_exported
from ..inputs.synthetic import cast_feeds
from ..tensorrt.on_demand import open_model


class TritonPythonModel:
    """The model of a package."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the model.

        Args:
            args: Triton's: `model_repository` (the model's folder), `model_version`, `model_config` (JSON, whose
                parameter `model` names the file), `model_instance_kind` and `model_instance_device_id`.
        """
        config = json.loads(args["model_config"])
        name = config["parameters"]["model"]["string_value"]
        on_gpu = args["model_instance_kind"] == "GPU"
        provider = f"cuda:device_id={args['model_instance_device_id']}" if on_gpu else "cpu"
        place = Path(args["model_repository"]) / args["model_version"] / name
        self.outputs = [row["name"] for row in config["output"]]
        self.runner = open_model(open_exported(place), None, provider)
        self.runner.__enter__()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Run each request; one that fails is answered with its error, and the others with their outputs."""
        import triton_python_backend_utils as triton

        answers = []
        for request in requests:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            try:
                results = self.runner.run(cast_feeds(feeds, self.runner.inputs()))
            except RmsnormDeployError as error:
                answers.append(triton.InferenceResponse(error=triton.TritonError(str(error))))
                continue
            wanted = set(request.requested_output_names())
            tensors = [triton.Tensor(name, results[name]) for name in self.outputs if name in wanted]
            answers.append(triton.InferenceResponse(output_tensors=tensors))
        return answers

    def finalize(self) -> None:
        """Release the model."""
        self.runner.__exit__(None, None, None)
