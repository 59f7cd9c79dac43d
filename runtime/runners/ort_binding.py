"""Run a session of ONNX Runtime with inputs and outputs that stay bound from one run to the next (`Binding`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Binding:
    """Binds what has changed since the last run, and runs.

    Args:
        session: ONNX Runtime's session.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._inputs: dict[str, Any] = {}
        self._outputs: dict[str, Any] = {}

    def run(self, values: Mapping[str, Any], names: Sequence[str], targets: Mapping[str, Any]) -> list[Any]:
        """Run once.

        Args:
            values: an OrtValue for each input.
            names: the outputs, the same in each run.
            targets: OrtValues that outputs are written to.

        Returns:
            The OrtValues of the outputs without a target, in the order of their names. They are valid until the next
            run.
        """
        for name, value in values.items():
            if self._inputs.get(name) is not value:
                self._binding.bind_ortvalue_input(name, value)
                self._inputs[name] = value  # keeps the memory of an array
        for name in names:
            target = targets.get(name)
            if target is None:
                self._binding.bind_output(name, "cpu")  # anew, because a run leaves its result bound
            elif self._outputs.get(name) is not target:
                self._binding.bind_ortvalue_output(name, target)
                self._outputs[name] = target
        from onnxruntime import OrtValue

        self._session.run_with_iobinding(self._binding)
        results = self._binding.get_outputs_as_ortvaluevector()
        return [OrtValue(results[place]) for place, name in enumerate(names) if name not in targets]
