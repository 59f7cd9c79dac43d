"""Run a PyTorch module (`TorchRunner`): the baseline in the deployment dtype, and the reference in float64."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.calling.calls import CallForm, named_tensors, split_arguments
from ...models.calling.rotary import reset_rotary
from ...models.dtypes import torch_name
from ...models.errors import EnvironmentMissingError, UnsupportedError, UsageError
from ...models.precision import convert
from ...models.tensors import to_numpy, to_torch
from .base import ANY_DTYPE, Array, ClosesOnExit, TensorInfo, check_feeds, describe_feeds, tokens_between

if TYPE_CHECKING:
    import torch
    from torch import nn


class TorchRunner(ClosesOnExit):
    """Runs an `nn.Module` in eval mode and without gradients.

    The module's parameters are never changed, and `close` restores every submodule's training flag. With `dtype` or
    `device`, a deep copy runs and the module is not changed at all.

    A float64 copy has the module's own parameters, converted to float64: for the reference of a half-precision
    deployment, give the half-precision module. Modules that cast to float32 themselves still do.

    Args:
        model: the module.
        input_names: names of the feeds. If all are parameters of `forward`, they are passed by keyword, otherwise in
            the order of its parameters. None: feeds are named as the parameters of `forward`.
        output_names: names of the outputs in order, after None and caches are dropped. None: the keys of a mapping,
            `output` for a tensor, `output_0`, `output_1` and so on for a tuple (`output_0_1` if nested).
        dtype: a floating-point dtype to which a deep copy and the floating-point feeds are cast; see `convert` for the
            parts that stay in float32.
        device: the device on which a deep copy runs, such as `cuda`.
        include_cache: return the tensors of key-value caches too.
        form: which of the feeds are parts of nested arguments, and the arguments that are not tensors.

    Raises:
        UsageError: the model is not a module or cannot be copied, or the names do not match `forward`.
        EnvironmentMissingError: the device is not available.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        include_cache: bool = False,
        form: CallForm | None = None,
    ) -> None:
        from torch import nn

        if not isinstance(model, nn.Module):
            raise UsageError(f"TorchRunner: expected an nn.Module, got {type(model).__name__}.")
        self._where = type(model).__name__
        self._dtype = _floating_dtype(dtype)
        self._form = form or CallForm()
        self._parameters = _Parameters(model, input_names, self._form)
        self._output_names = None if output_names is None else list(output_names)
        self._include_cache = include_cache
        self._last_outputs: list[TensorInfo] = []
        self._model: nn.Module | None = model
        if dtype is not None or device is not None:
            self._model = _moved_copy(model, self._dtype, device)
        self._training = [(module, module.training) for module in self._model.modules()]

    def close(self) -> None:
        """Restore the training flags and release the module."""
        for module, flag in self._training:
            module.training = flag
        self._training, self._model = [], None

    def inputs(self) -> list[TensorInfo]:
        """The `input_names`, or the parameters of `forward` without a default; dtypes and shapes are unknown."""
        return [TensorInfo(name, ANY_DTYPE, None) for name in self._parameters.required]

    def outputs(self) -> list[TensorInfo]:
        """The outputs of the last run; before the first run, the `output_names` if they were given."""
        if self._last_outputs:
            return list(self._last_outputs)
        return [TensorInfo(name, ANY_DTYPE, None) for name in self._output_names or ()]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run one forward pass; see `Runner.run`.

        Raises:
            UsageError: the feeds do not match `forward`, the module fails on them, or the number of outputs is not
                that of `output_names`.
            UnsupportedError: the module returns something other than tensors.
        """
        reset_rotary(self._opened())
        return self._returned(self._call(feeds))

    def run_calls(self, feeds: Mapping[str, Array], ends: Sequence[int]) -> dict[str, Array]:
        """Run a decoder of transformers in several calls, each with the cache that the last one left.

        Args:
            feeds: all tokens, `[batch, length]`.
            ends: the number of tokens after each call, in ascending order; the last is the length.

        Returns:
            As `run`, the outputs of the calls joined along the length.

        Raises:
            UsageError: as `run`; or the model returns no cache.
        """
        reset_rotary(self._opened())
        found: list[dict[str, Array]] = []
        result: Any = None
        for start, end in itertools.pairwise([0, *ends]):
            names = [name for name in ("cache", "past_key_values") if getattr(result, name, None) is not None]
            if start and not names:
                raise UsageError(f"{self._where} returns no past_key_values, so it cannot run in several calls.")
            cache = {name: getattr(result, name) for name in names[:1]}
            result = self._call(tokens_between(feeds, start, end), **cache, use_cache=True)
            found.append(self._arrays(result, False))
        last = self._returned(result)
        joined = {
            name: np.concatenate([part[name] for part in found], axis=1) if value.ndim > 1 else value
            for name, value in found[-1].items()
        }
        return {name: joined.get(name, value) for name, value in last.items()}

    def _opened(self) -> nn.Module:
        if self._model is None:
            raise UsageError(f"{self._where}: the runner is closed.")
        return self._model

    def _call(self, feeds: Mapping[str, Array], **more: Any) -> Any:
        """What the module returns for arrays, and for arguments that are given to it as they are."""
        import torch

        model = self._opened()
        keywords = self._parameters.keywords(feeds, self._where)
        device = _device_of(model)
        tensors = {name: self._placed(to_torch(array), device) for name, array in keywords.items()}
        # Set it before every run: other code may have changed the mode in between.
        model.eval()
        try:
            with torch.no_grad():
                positional, keyword = split_arguments(model.forward, self._form.nested(tensors))
                return model(*positional, **keyword, **more)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError) as error:
            raise UsageError(f"{self._where} failed on {describe_feeds(feeds)}: {error}") from error

    def _arrays(self, result: Any, include_cache: bool) -> dict[str, Array]:
        found = named_tensors(result, self._where, include_cache)
        return {name: _array(tensor, name, self._where) for name, tensor in found.items()}

    def _returned(self, result: Any) -> dict[str, Array]:
        outputs = self._named(self._arrays(result, self._include_cache))
        self._last_outputs = [TensorInfo(n, a.dtype.name, tuple(a.shape)) for n, a in outputs.items()]
        return outputs

    def provenance(self) -> dict[str, Any]:
        """Version, device, dtypes, numeric settings and the number of parameters.

        Raises:
            UsageError: the runner is closed.
        """
        import torch

        if self._model is None:
            raise UsageError(f"{self._where}: the runner is closed.")
        device = _device_of(self._model)
        return {
            "runner": "torch",
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "device": str(device),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "model": self._where,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "parameter_dtypes": sorted({torch_name(p.dtype) for p in self._model.parameters()}),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        }

    def _placed(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.to(device)

    def _named(self, outputs: dict[str, Array]) -> dict[str, Array]:
        if self._output_names is None:
            return outputs
        if len(outputs) != len(self._output_names):
            raise UsageError(
                f"{self._where} returned {len(outputs)} outputs ({', '.join(outputs)}), but output_names has "
                f"{len(self._output_names)}: {', '.join(self._output_names)}."
            )
        return dict(zip(self._output_names, outputs.values(), strict=True))


class _Parameters:
    """Maps feeds to keyword arguments of `forward`.

    Attributes:
        required: names that must be fed, in order.
    """

    def __init__(self, model: nn.Module, input_names: Sequence[str] | None, form: CallForm) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names = [p.name for p in plain]
        self._takes_any = input_names is None and any(p.kind is p.VAR_KEYWORD for p in parameters)
        if input_names is None:
            self._keyword_of = {name: name for name in (*names, *form.tensors)}
            own = [p.name for p in plain if p.default is p.empty and p.name not in form.arguments]
            self.required = [*own, *form.required(model.forward)]
            return
        self.required = list(input_names)
        if set(input_names) <= set(names):
            self._keyword_of = {name: name for name in input_names}
            return
        self._keyword_of = dict(zip(input_names, names, strict=False))
        where = f"{type(model).__name__}.forward({', '.join(names)})"
        if len(input_names) > len(names):
            raise UsageError(
                f"{where}: expected at most {len(names)} inputs, got {len(input_names)}: {', '.join(input_names)}."
            )
        crossed = [name for name, keyword in self._keyword_of.items() if name != keyword and name in names]
        if crossed:
            raise UsageError(
                f"{where}: input_names {', '.join(input_names)} are matched by position, but {', '.join(crossed)} is "
                "the name of another parameter; give the parameters' names, or names that no parameter has."
            )

    def keywords(self, feeds: Mapping[str, Array], where: str) -> dict[str, Array]:
        """The arguments of `forward`; raises UsageError if the feeds do not match."""
        known = [n for n in feeds if n in self._keyword_of or self._takes_any]
        infos = [TensorInfo(n, ANY_DTYPE, None) for n in dict.fromkeys([*self.required, *known])]
        check_feeds(infos, feeds, where)
        return {self._keyword_of.get(name, name): array for name, array in feeds.items()}


def _floating_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise UsageError(f"TorchRunner: dtype: expected a floating-point dtype of PyTorch, such as float64, got {dtype!r}.")


def _moved_copy(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    import torch

    try:
        target = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"TorchRunner: {device!r} is not a device of PyTorch: {error}") from error
    if target is not None and target.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentMissingError(
            f"TorchRunner: device {device} was requested, but PyTorch {torch.__version__} finds no CUDA device. "
            "Install the CUDA build of PyTorch on a machine with an NVIDIA GPU, or omit the device."
        )
    try:
        duplicate = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{type(model).__name__} cannot be copied to another dtype or device: {error}") from error
    if dtype is not None:
        convert(duplicate, dtype)
    return duplicate.to(device=target)


def _device_of(model: nn.Module) -> torch.device:
    import torch

    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def _array(tensor: torch.Tensor, name: str, where: str) -> Array:
    try:
        return to_numpy(tensor)
    except (TypeError, RuntimeError) as error:
        raise UnsupportedError(
            f"{where}: output {name} is a {tensor.dtype} tensor, which numpy does not support: {error}"
        ) from error
