"""Call copies of one module, with tensors, shapes and inputs of the prober's choice, and watch for side effects."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .conditions import changed_in_place
from .isolate import stand_in
from .signature import NotANormError, second_input
from .state import Snapshot

WIDTHS_WITHOUT_WEIGHT = (64, 96)


class RefusedError(Exception):
    """The module normalizes, but no NormSpec describes it; the message is the reason."""


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own floating parameters and buffers, by attribute name."""
    tensors = {**module._parameters, **module._buffers}
    return {name: t for name, t in tensors.items() if t is not None and t.is_floating_point()}


class Caller:
    """Calls copies of a module; the module itself is not called."""

    def __init__(
        self, module: nn.Module, device: torch.device, default_dtype: torch.dtype, before: Snapshot, threads: int
    ) -> None:
        self.module = module
        self.device = device
        self.tensors = own_tensors(module)
        # Plain tensor attributes may change at any time without notice, so a norm must not depend on them.
        self.loose = {
            name: t for name, t in vars(module).items() if isinstance(t, Tensor) and t.is_floating_point()
        }  # fmt: skip
        self.own_dtype = next((t.dtype for t in self.tensors.values()), default_dtype)
        self.generator = torch.Generator().manual_seed(20_240_229)
        self.accepts_gate, self.needs_gate = second_input(module)
        self.threads, self.writes_input = threads, False
        self.snapshots = [before]  # of the module, then of each copy that is called

    def _side_effect(self) -> RefusedError | None:
        """The reason to refuse a forward that does more than return its result."""
        if self.writes_input:
            return RefusedError("it changes its input in place")
        for snapshot in self.snapshots:
            name = snapshot.changed()
            if name is not None:
                return RefusedError(f"its forward changes the state of the module ({name})")
        return None

    def _copy(self, dtype: torch.dtype, tensors: dict[str, Tensor], watch: bool = False) -> nn.Module:
        """A copy of the module with other tensors and without hooks; its state is watched where `watch` is True."""
        clone = stand_in(self.module)
        for name, tensor in tensors.items():
            if name in clone._parameters:
                clone._parameters[name] = nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False)
            else:
                clone._buffers[name] = tensor.to(dtype, copy=True)
        if watch:
            self.snapshots.append(Snapshot(clone, classes=False))
        return clone

    def _random_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Values that reveal how a weight is used: no ones, no zeros, both signs, in the range of every dtype."""
        return {name: (self._randn(*t.shape) * 0.7 + 0.2).to(dtype) for name, t in self.tensors.items()}

    def _call(self, module: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
        inputs = [x] if gate is None else [x, gate]
        given = [t.clone() for t in inputs]
        result = module.forward(*given)
        self.writes_input |= any(map(changed_in_place, inputs, given))
        if not isinstance(result, Tensor) or result.shape != x.shape or not result.is_floating_point():
            raise NotANormError
        return result

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu").to(self.device)

    def _gate_like(self, x: Tensor) -> Tensor:
        return (self._randn(*x.shape) * 2).to(x.dtype)

    def _callable_width(self, module: nn.Module) -> tuple[tuple[int, ...], bool]:
        """The trailing shape that the module accepts, and whether it takes a gate.

        Raises:
            NotANormError: no call works, or the output is not normalized.
        """
        last = NotANormError()
        for gated in [True] * self.accepts_gate + [False] * (not self.needs_gate):
            for width in self._widths():
                try:
                    self._check_unit_dims(module, width, gated)
                    self._check_normalizes(module, width, gated)
                except RefusedError:
                    raise
                except NotANormError as error:
                    last = error
                except Exception as error:  # any error means that the module is not called this way
                    last = NotANormError(str(error))
                else:
                    return width, gated
        raise last

    def _works_without_gate(self, width: tuple[int, ...]) -> bool:
        try:
            self._call(self._copy(torch.float32, self.tensors), self._randn(2, 3, *width), None)
        except Exception:  # the second input has a default, but the module requires it
            return False
        return True

    def _widths(self) -> Iterator[tuple[int, ...]]:
        shapes = sorted({tuple(t.shape) for t in self.tensors.values()}, key=lambda s: -math.prod(s))
        if shapes:
            if len(self.tensors) > 2 or any(s and max(s) != math.prod(s) != math.prod(shapes[0]) for s in shapes):
                raise NotANormError
            shape = shapes[0]
            while len(shape) > 1 and shape[0] == 1:
                shape = shape[1:]
            yield shape or (1,)
            if len(shape) > 1:
                yield (math.prod(shape),)
            return
        declared = self._declared_width(None)
        if declared is not None:
            yield declared
        for size in WIDTHS_WITHOUT_WEIGHT:
            yield (size,)
        for tensor in self.loose.values():
            if tensor.ndim == 1:
                yield tuple(tensor.shape)

    def _declared_width(self, fallback: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """The `normalized_shape` of a norm without a weight, if the module has that attribute."""
        shape = getattr(self.module, "normalized_shape", None)
        if isinstance(shape, int):
            return (shape,)
        if isinstance(shape, tuple | list | torch.Size) and shape and all(isinstance(n, int) for n in shape):
            return tuple(shape)
        return None

    def _check_normalizes(self, module: nn.Module, width: tuple[int, ...], gated: bool) -> None:
        """Check that the output is invariant to the scale of the input (a norm), but not to a shift (a LayerNorm)."""
        x = self._randn(2, 3, *width)
        gate = self._gate_like(x) if gated else None
        y = self._call(module, x, gate)
        big = x * 64
        reference, scaled = self._call(module, big, gate).double(), self._call(module, big * 64, gate).double()
        peak = reference.abs().max()
        if not torch.isfinite(reference).all() or peak == 0 or y.double().std() == 0:
            raise NotANormError
        if (reference - scaled).abs().max() > 1e-2 * peak:
            raise NotANormError
        flat = self._call(module, torch.sign(big), gate).double()
        if math.prod(width) > 1 and (flat != 0).all() and torch.equal(flat, reference):
            raise NotANormError  # depends only on signs, so there are no statistics
        shifted = self._call(module, big + 4096, gate).double()
        if (reference - shifted).abs().max() <= 2e-2 * peak and x.shape[-1] > 2:
            raise RefusedError("it subtracts the mean (LayerNorm): not an RMS norm")

    def _check_unit_dims(self, module: nn.Module, width: tuple[int, ...], gated: bool) -> None:
        """Refuse a weight whose dims of size 1 broadcast over any width: the normalized dims are then unknown."""
        if not self.tensors or 1 not in width:
            return
        try:
            self._check_normalizes(module, tuple(8 if size == 1 else size for size in width), gated)
        except RefusedError:
            raise
        except Exception:  # these dims are fixed at 1, or it is not a norm
            return
        raise RefusedError(
            "its weight broadcasts over a width that the module does not fix (a scalar, or a norm over channels)"
        )
