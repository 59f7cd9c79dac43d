"""What a validation is asked for: the one set of options behind the command line, replay and `validate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...models.errors import UsageError
from ..accuracy.tolerances import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    """How a deployed model is held against PyTorch. Every field is kept in the report, which can be run again from it.

    Attributes:
        dtype: to load the PyTorch model in, where it is given by name; the exported one when None.
        provider: ONNX Runtime's execution provider: `cpu`, `cuda` or `tensorrt`.
        seed: of made-up inputs and adversarial rows.
        shapes: batch and length of each made-up input; `(1, 1), (1, 7), (3, 33)` when None.
        inputs: inputs in place of made-up ones, see `load_cases`.
        prompts: inputs in place of made-up ones: texts, see `prompt_cases`.
        tokenizer: for prompts; when None it is looked for beside the candidate, then beside the PyTorch model.
        limits: explicit limits by output name, `*` for all others, in place of the rule that compares with PyTorch's
            own error. They are for outputs; norms and segments are held to the table of tolerances.
        outputs_only: leave norms and segments out.
        depth: measure how error grows along the depth.
        window: norms that are looked at together: fewer need less memory. None looks at all together.
        bisect: the report is one of bisect, which says where error is introduced.

    Raises:
        UsageError: a value is out of range, or two exclude each other.
    """

    # Read by pydantic, when a report is run again: types must match, and there are no other fields.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"strict": True, "extra": "forbid"}

    dtype: str | None = None
    provider: str = "cpu"
    seed: int = 0
    shapes: tuple[tuple[int, int], ...] | None = None
    inputs: str | None = None
    prompts: tuple[str, ...] = ()
    tokenizer: str | None = None
    limits: Mapping[str, Limits] = field(default_factory=dict)
    outputs_only: bool = False
    depth: bool = False
    window: int | None = None
    bisect: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise UsageError(f"prompts is {self.prompts!r}: expected a list of texts.")
        # Lists are what users write; tuples are equal after a way through JSON.
        object.__setattr__(self, "prompts", tuple(self.prompts))
        if self.shapes is not None:
            object.__setattr__(self, "shapes", tuple((batch, length) for batch, length in self.shapes))
        for batch, length in self.shapes or ():
            if batch < 1 or length < 1:
                raise UsageError(f"shape {batch}x{length}: expected a batch and a length of at least 1.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"window is {self.window}: expected at least 1 norm, or None for all together.")
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: expected a number of at least 0.")
        if self.inputs is not None and self.prompts:
            raise UsageError("inputs and prompts are both given; give one of the two.")
        if self.bisect and self.outputs_only:
            raise UsageError("bisect looks at norms and segments; it cannot be combined with outputs_only.")

    @property
    def with_depth(self) -> bool:
        """Whether errors along the depth are measured: bisect needs them."""
        return self.depth or self.bisect

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        values = dataclasses.asdict(self)
        values["limits"] = {name: dataclasses.asdict(limits) for name, limits in self.limits.items()}
        values["shapes"] = None if self.shapes is None else [list(shape) for shape in self.shapes]
        return {**values, "prompts": list(self.prompts)}
