"""Find the attention modules of a model whose functions follow an AttentionSpec (`find_attention`).

The model runs once. What each attention function returned is compared with `attend`, as are its results for other
lengths and masks than those of the run; a module whose function does anything else is refused with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import torch_name
from .attend import attend
from .call import FUNCTIONAL, IMPLEMENTATIONS, AttentionCall
from .intercept import intercepted
from .spec import AttentionSpec

# Differences up to this many eps of the function's dtype, relative to the largest value, are roundings.
_ROUNDINGS = 64
_SEED = 0
# A window is tried at its edge up to this size.
_WIDEST_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention module.

    Attributes:
        path: path of the module.
        class_name: its class.
        spec: what its function computes; `causal` is False, because that depends on the mask of a call.
    """

    path: str
    class_name: str
    spec: AttentionSpec


@dataclass(frozen=True, slots=True)
class AttentionRefusal:
    """An attention module that follows no spec, and why."""

    path: str
    class_name: str
    reason: str


@dataclass(frozen=True, slots=True)
class AttentionRecognition:
    """The attention modules of a model, in the order of their calls.

    Attributes:
        sites: those that follow a spec.
        refusals: the others.
        reads_silent: whether the model reads what queries get that attend to nothing, see `reads_silent_queries`.
    """

    sites: list[AttentionSite] = field(default_factory=list)
    refusals: list[AttentionRefusal] = field(default_factory=list)
    reads_silent: bool = False

    def spec(self, path: str | None) -> AttentionSpec | None:
        """The spec of the module at this path, or None."""
        return next((site.spec for site in self.sites if site.path == path), None)


def find_attention(model: nn.Module, run: Callable[[], Any]) -> AttentionRecognition:
    """Find the attention modules that follow a spec.

    Args:
        model: a model in eval mode.
        run: runs the model on example inputs.

    Returns:
        The modules that called an attention function, of transformers' registry or
        `torch.nn.functional.scaled_dot_product_attention`.
    """
    paths = {module: path for path, module in model.named_modules()}
    specs: dict[str, AttentionSpec] = {}
    reasons: dict[str, str] = {}
    known: dict[Hashable, str | None] = {}

    def handle(call: AttentionCall) -> tuple[Tensor, Any]:
        result = call.original()
        path = paths.get(call.module)
        if path is not None and path not in reasons:
            reason, spec = _judged(call, result[0], known)
            if reason is None and specs.setdefault(path, spec) != spec:
                reason = f"its calls differ: {specs[path].describe()}, and {spec.describe()}"
            if reason is not None:
                reasons[path] = reason
        return result

    with torch.no_grad(), intercepted(model, handle):
        run()
    classes = {path: type(module).__name__ for module, path in paths.items()}
    sites = [AttentionSite(path, classes[path], spec) for path, spec in specs.items() if path not in reasons]
    return AttentionRecognition(sites, [AttentionRefusal(p, classes[p], reason) for p, reason in reasons.items()])


def spec_of(call: AttentionCall) -> AttentionSpec:
    """The spec that the arguments of a call describe, without `causal`."""
    given = call.option("scaling")
    scale = float(given) if isinstance(given, int | float) else int(call.query.shape[-1]) ** -0.5
    softcap = call.option("softcap")
    return AttentionSpec(scale, None if softcap is None else float(softcap), sink=call.option("s_aux") is not None)


def is_causal(call: AttentionCall) -> bool:
    """Whether the function hides later keys by itself, because the call has no mask."""
    if call.implementation == FUNCTIONAL:
        return call.mask is None and bool(call.option("is_causal"))
    if call.mask is not None or call.implementation != "sdpa" or call.query.shape[2] == 1:
        return False
    given = call.option("is_causal")
    return bool(getattr(call.module, "is_causal", True) if given is None else given)


def bias_of(call: AttentionCall) -> Tensor | None:
    """The mask and the position bias of a call as one tensor to add, finite, in the dtype of the query."""
    dtype, bias, mask = call.query.dtype, call.option("position_bias"), call.mask
    least = lowest(dtype)
    if mask is not None and call.implementation == FUNCTIONAL:
        mask = expanded(call, mask)
    if mask is None:
        return None if bias is None else bias.to(dtype)
    if mask.dtype == torch.bool:
        kept = torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias.to(dtype)
        return torch.where(mask, kept, torch.full((), least, dtype=dtype, device=mask.device))
    total = mask if bias is None else mask + bias
    as_it_is = total is call.mask and mask.dtype == dtype != torch.float64 and call.implementation != FUNCTIONAL
    return total if as_it_is else total.clamp(min=least).to(dtype)


def expanded(call: AttentionCall, mask: Tensor) -> Tensor:
    """A mask that is broadcast, as `[B or 1, H or 1, S, T]`: ONNX Runtime's operator broadcasts only the first dims."""
    mask = mask[(None,) * (4 - mask.ndim)]
    wanted = (mask.shape[0], mask.shape[1], call.query.shape[2], call.key.shape[2])
    pairs = zip(mask.shape, wanted, strict=True)
    broadcast = [_is_one(size) and not _is_one(other) for size, other in pairs]
    return mask.expand([new if one else -1 for one, new in zip(broadcast, wanted, strict=True)])


def attending(call: AttentionCall, *, of_registry: bool) -> Tensor | None:
    """Which queries attend to a key, bool `[B or 1, S or 1, H or 1, 1]`: torch's own function returns zeros elsewhere.

    None where a call has no mask, where its mask has no meaning alone (it is added in the lowest value), and without
    `of_registry` for functions of transformers' registry, where what padding gets is seldom read.
    """
    if call.mask is None or not (call.implementation == FUNCTIONAL or (of_registry and call.mask.dtype == torch.bool)):
        return None
    mask = call.mask[(None,) * (4 - call.mask.ndim)]
    shown = mask if mask.dtype == torch.bool else mask > -math.inf
    return shown.any(-1, keepdim=True).transpose(1, 2)


def _is_one(size: Any) -> bool:
    """Whether a size is 1 at any sizes of the inputs."""
    return known_size(size) == 1


def known_size(size: int | torch.SymInt) -> int | None:
    """The size, where it is fixed also under `torch.export`; None for one that varies."""
    found: int | None = size if isinstance(size, int) else size.node.maybe_as_int()
    return found


def lowest(dtype: torch.dtype) -> float:
    """The value of what is not attended to: the dtype's lowest, and float32's for float64.

    Exporters write constants as float32, in which the lowest value of float64 is infinite.
    """
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def obstacle(call: AttentionCall) -> str | None:
    """Why a call cannot be described by a spec, or None."""
    if call.implementation == FUNCTIONAL:
        return _functional_obstacle(call)
    if call.implementation not in IMPLEMENTATIONS:
        return f"its attention implementation is {call.implementation!r}; expected {' or '.join(IMPLEMENTATIONS)}"
    if call.option("output_attentions"):
        return "the model returns its attention weights"
    if call.unread():
        return f"its function is called with {', '.join(call.unread())}, which no spec covers"
    sink, heads = call.option("s_aux"), call.query.shape[1]
    if call.query.ndim != 4 or heads % call.key.shape[1]:
        return f"expected queries [B, H, S, D] and keys whose heads divide H, got {heads} and {call.key.shape[1]} heads"
    if sink is not None and tuple(sink.shape) != (heads,):
        return f"expected one sink for each of {heads} heads, got shape {tuple(sink.shape)}"
    return None


def _functional_obstacle(call: AttentionCall) -> str | None:
    query, key, value, mask = call.query, call.key, call.value, call.mask
    dropout, scale = call.option("dropout"), call.option("scaling")
    if not isinstance(dropout, int | float) or dropout != 0:
        return f"it calls scaled_dot_product_attention with dropout_p {dropout}; expected 0 in a model in eval mode"
    if call.option("combined"):
        return "it has a mask and is_causal, which versions of torch combine or refuse"
    if isinstance(scale, bool) or not isinstance(scale, int | float | None):
        return f"its scale is a {type(scale).__name__}; expected a number"
    if scale is not None and not 0 < scale < math.inf:
        return f"its scale is {scale}; expected a positive one, as runtimes do"
    ranks = [tensor.ndim for tensor in (query, key, value)]
    if ranks != [4, 4, 4] or (mask is not None and mask.ndim > 4):
        ranks += [mask.ndim] if mask is not None else []
        return f"expected queries, keys and values [B, H, S, D] and a mask of at most 4 dims, got {ranks} dims"
    if any(tensor.is_nested or _is_mapped(tensor) for tensor in (query, key, value)):
        return "its tensors are nested, or mapped by torch.vmap"
    if _differ(key.shape[0], query.shape[0]) or _differ(value.shape[0], query.shape[0]):
        return "its queries, keys and values have unequal batches"
    heads, groups, other = (int(tensor.shape[1]) for tensor in (query, key, value))
    if not groups or groups != other or heads % groups:
        return (
            f"expected equal heads of keys and values that divide those of queries, got {heads}, {groups} and {other}"
        )
    return None


def _differ(one: Any, other: Any) -> bool:
    """Whether two sizes differ; of symbolic ones, whether one of them is 1, which would be broadcast."""
    sizes = known_size(one), known_size(other)
    return sizes[0] != sizes[1] if None not in sizes else 1 in sizes


def _is_mapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def _judged(call: AttentionCall, result: Tensor, known: dict[Hashable, str | None]) -> tuple[str | None, AttentionSpec]:
    reason = obstacle(call)
    if reason is not None:
        return reason, AttentionSpec(math.nan)
    spec = spec_of(call)
    reason = _differs(call, spec, result, "as this model calls it")
    if reason is None:
        key = _key(call, spec)
        if key not in known:
            known[key] = _differs_elsewhere(call, spec)
        reason = known[key]
    return reason, spec


def _key(call: AttentionCall, spec: AttentionSpec) -> Hashable:
    """Calls with equal keys are calls of one function with one meaning; the index of a layer has none."""
    plain = {k: v for k, v in vars(call.module).items() if isinstance(v, str | int | float) and k != "layer_idx"}
    shapes = (call.query.shape[1], call.key.shape[1], call.query.shape[3], call.value.shape[3])
    options = tuple(sorted((k, repr(v)) for k, v in call.options.items() if not isinstance(v, Tensor)))
    sink = call.option("s_aux")
    values = None if sink is None else tuple(sink.flatten().tolist())
    return type(call.module), call.function, tuple(sorted(plain.items())), spec, shapes, options, values


def _differs_elsewhere(call: AttentionCall, spec: AttentionSpec) -> str | None:
    for name, other in _variations(call):
        try:
            result = other.original()[0]
        except Exception as error:
            return f"{name}, its function fails: {' '.join(str(error).split())[:200]}"
        reason = _differs(other, spec, result, name)
        if reason is not None:
            return reason
    return None


def _variations(call: AttentionCall) -> Iterator[tuple[str, AttentionCall]]:
    """The call with random float32 tensors of other lengths, with masks that hide padding on the left."""
    window = call.option("sliding_window")
    lengths = [("with 5 queries and 9 keys", 5, 9), ("with 1 query and 9 keys", 1, 9)]
    if isinstance(window, int) and 0 < window <= _WIDEST_WINDOW:
        lengths.append((f"with {window + 3} keys, more than its window", 2, window + 3))
    yield "without a mask", _with_lengths(call, 6, 6, masked=False)
    if call.implementation == FUNCTIONAL:
        yield "without a mask, with 5 queries and 9 keys", _with_lengths(call, 5, 9, masked=False)
    for name, queries, keys in lengths:
        yield name, _with_lengths(call, queries, keys, masked=True)


def _with_lengths(call: AttentionCall, queries: int, keys: int, *, masked: bool) -> AttentionCall:
    generator = torch.Generator().manual_seed(_SEED)
    device = call.query.device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    heads, groups = call.query.shape[1], call.key.shape[1]
    options = dict(call.options)
    if options.get("position_bias") is not None:
        options["position_bias"] = random(1, options["position_bias"].shape[1], queries, keys)
    mask: Tensor | None = None
    if masked:
        mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        mask[1, :, :, :2] = False
        if call.implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        mask = mask.to(device)
    return replace(
        call,
        query=random(2, heads, queries, call.query.shape[3]),
        key=random(2, groups, keys, call.key.shape[3]),
        value=random(2, groups, keys, call.value.shape[3]),
        mask=mask,
        options=options,
    )


def _differs(call: AttentionCall, spec: AttentionSpec, result: Tensor, where: str) -> str | None:
    """Why the result is not that of the spec, or None. Rows that attend to nothing have no meaning."""
    bias = bias_of(call)
    causal = replace(spec, causal=is_causal(call))
    sink = call.option("s_aux")
    try:
        wanted = attend(causal, call.query, call.key, call.value, bias, sink, wide=torch.float64)
    except RuntimeError as error:
        return f"{where}, its tensors have other shapes than attention has: {' '.join(str(error).split())[:200]}"
    if result.shape != wanted.shape:
        return f"{where}, expected a result of shape {tuple(wanted.shape)}, got {tuple(result.shape)}"
    if result.dtype != call.query.dtype:
        return f"{where}, expected a result in {torch_name(call.query.dtype)}, got {torch_name(result.dtype)}"
    off = (result.double() - wanted).abs()
    if bias is not None:
        shape = (call.query.shape[0], call.query.shape[1], call.query.shape[2], call.key.shape[2])
        attended = (bias > lowest(bias.dtype) / 2).broadcast_to(shape).any(-1)
        off = torch.where(attended.transpose(1, 2)[..., None], off, 0.0)
    # An error of the scores, which may be large, is the same relative error of the result.
    scores = float(call.query.double().norm(dim=-1).max() * call.key.double().norm(dim=-1).max()) * abs(spec.scale)
    allowed = _ROUNDINGS * torch.finfo(result.dtype).eps * float(call.value.abs().max()) * (1.0 + scores)
    if not bool((off <= allowed).all()):
        return f"{where}, its result differs from that of {spec.describe()} by {float(off.max()):.3g}"
    return None
