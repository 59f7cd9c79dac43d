"""Probe one module: measure what it computes, then prove that a NormSpec reproduces it bit for bit.

Names are not used. Copies of the module are called in several dtypes, with random weights as well as its own; the
module's parameters, buffers, hooks and training mode and the random state are not changed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..dtypes import HALF_DTYPES, torch_dtype
from ..eager import eager
from ..spec import NormSpec
from .caller import WIDTHS_WITHOUT_WEIGHT, Caller, RefusedError, own_tensors
from .candidates import SAME_IN_HALF, in_float32, in_half, stated_eps
from .conditions import differs, probe_conditions
from .isolate import one_thread, untouched_random_state
from .probe_rows import adversarial_rows, rolled, same_bits
from .signature import NotANormError
from .state import Snapshot

_HALF_DTYPES = tuple(map(torch_dtype, HALF_DTYPES))
# A factor after which the mean square of a row is less than any eps.
_TINY = 2.0**-25
_PROBE_DTYPES = (torch.float32, *_HALF_DTYPES)


@dataclass(frozen=True, slots=True)
class Probed:
    """A proven spec, its width, and the attributes that hold the weight and the bias."""

    spec: NormSpec
    width: tuple[int, ...] | None
    weight: str | None
    bias: str | None
    called: tuple[int, ...] = field(default=(), compare=False)  # the trailing dims with which the module was called


@dataclass(frozen=True, slots=True)
class _Roles:
    """Which tensors of the module are the weight and the bias."""

    weight: str | None
    bias: str | None


def probe(module: nn.Module, default_dtype: torch.dtype = torch.float32, like: Probed | None = None) -> Probed:
    """Find the spec that reproduces the module.

    Args:
        module: a module without children that hold parameters; not on the meta device.
        default_dtype: the dtype of a module without tensors of its own.
        like: what was found for a module that differs from this one in the values of its tensors only, see
            `likeness`; this one is then proven with its own values alone.

    Raises:
        NotANormError: it does not normalize.
        RefusedError: it normalizes in a way that no spec covers.
    """
    device = next((t.device for t in own_tensors(module).values()), torch.device("cpu"))
    devices, threads = [device] if device.type == "cuda" else [], torch.get_num_threads()
    with (
        torch.inference_mode(False),
        untouched_random_state(devices),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        one_thread(),
    ):
        before = Snapshot(module)
        try:
            return _Prober(module, device, default_dtype, before, threads).run(like)
        finally:
            before.restore()


class _Prober(Caller):
    def run(self, like: Probed | None) -> Probed:
        try:
            probed = self._recognize() if like is None else self._recognize_like(like)
        except RefusedError as error:
            raise self._side_effect() or error from None
        effect = self._side_effect()
        if effect is not None:
            raise effect
        return probed

    def _recognize_like(self, like: Probed) -> Probed:
        roles = _Roles(like.weight, like.bias)
        self._prove(like.spec, roles, self.tensors, like.called, (self.own_dtype,))
        return like

    def _recognize(self) -> Probed:
        weights = [self._random_tensors(torch.float32), dict(self.tensors)]
        width, gated = self._callable_width(self._copy(torch.float32, weights[0]))
        copy32 = self._copy(torch.float32, weights[0], watch=True)
        trailing, group = self._extent(copy32, width, gated)
        eps = self._eps(copy32, width, trailing, group, gated)
        base = NormSpec(eps=0.0, trailing_dims=trailing, group_size=group)
        survivors = self._match_float32(base, eps, weights[0], width, gated)
        spec, roles = self._match_casts(survivors, weights[0], width, gated)
        if gated and self._works_without_gate(width):
            self._prove(spec.replace(gate="none", activation="none"), roles, weights[0], width, self._dtypes())
        self._prove_conditions(spec, roles, weights, width)
        for tensors in weights[1:]:
            self._prove(spec, roles, tensors, width, (self.own_dtype,))
        self._prove_independent(spec, roles, width)
        if roles.weight is None:
            self._prove_other_widths(spec, roles, width)
            return Probed(spec, self._declared_width(width), None, None, width)
        return Probed(spec, width[len(width) - trailing :], roles.weight, roles.bias, width)

    # Measuring ----------------------------------------------------------------------------------------------------

    def _extent(self, module: nn.Module, width: tuple[int, ...], gated: bool) -> tuple[int, int | None]:
        """The number of trailing dims normalized together, and the group size: by which outputs one input changes."""
        if math.prod(width) == 1:
            return len(width), None
        x = self._randn(2, 3, *width)
        gate = self._gate_like(x) if gated else None
        moved = x.clone()
        moved[(0, 0, *([0] * len(width)))] += 8.0
        changed = self._call(module, x, gate) != self._call(module, moved, gate)
        if changed[1:].any() or changed[0, 1:].any():
            raise RefusedError("it normalizes over a dim that is not trailing (rows depend on each other)")
        changed = changed[0, 0]
        for trailing in range(1, len(width) + 1):
            inside = changed[(0,) * (len(width) - trailing)]
            if inside.all() and int(changed.sum()) == inside.numel():
                return trailing, None
        if len(width) == 1:
            count = int(changed.sum())
            if count > 1 and width[0] % count == 0 and changed[:count].all():
                return 1, count
        if int(changed.sum()) <= 1 and math.prod(width) > 1:
            raise NotANormError
        raise RefusedError("the elements that it normalizes together are neither trailing dims nor equal groups")

    def _eps(
        self, module: nn.Module, width: tuple[int, ...], trailing: int, group: int | None, gated: bool
    ) -> list[float]:
        """Candidates for eps, best first: measured on small inputs, then matched to the module's own numbers.

        With y(t) the output for t * u: (y(t) / y(large))^2 = t^2 q / (t^2 q + eps), q the mean (or sum) of u^2.
        """
        u = torch.sign(self._randn(2, 3, *width))
        gate = self._gate_like(u) if gated else None
        count = group or math.prod(width[len(width) - trailing :])
        offset = self._call(module, torch.zeros_like(u), gate).double().nan_to_num(0.0)  # the bias, if there is one
        large = self._call(module, u * 2.0**20, gate).double() - offset
        for exponent in range(56):
            t = 2.0**-exponent
            ratio = ((self._call(module, u * t, gate).double() - offset) / large).nanmedian().item()
            if ratio < 0.8:
                break
        else:
            return [0.0]
        if not ratio > 1e-3:
            raise RefusedError("small inputs give 0: eps is not added to the mean of squares inside the root")
        squares = t * t
        if gated and self._gate_is_before(module, width):
            return stated_eps(self.module, None)
        over_mean = squares * (1 / ratio**2 - 1)
        return [*stated_eps(self.module, over_mean), *stated_eps(self.module, over_mean * count)]

    def _gate_is_before(self, module: nn.Module, width: tuple[int, ...]) -> bool:
        x = self._randn(2, 3, *width) * 2.0**10
        gate = self._gate_like(x)
        doubled = self._call(module, x, gate * 8) / self._call(module, x, gate)
        return bool(doubled.abs().median() < 4)

    # Proving ------------------------------------------------------------------------------------------------------

    def _dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(dict.fromkeys((*_PROBE_DTYPES, self.own_dtype)))

    def _roles(self) -> list[_Roles]:
        names = sorted(self.tensors, key=lambda name: "bias" in name)
        roles = [_Roles(None, None), *(_Roles(name, None) for name in names)]
        if len(names) == 2:
            roles += [_Roles(names[0], names[1]), _Roles(names[1], names[0])]
        return roles[::-1]

    def _match_float32(
        self, base: NormSpec, eps: list[float], tensors: dict[str, Tensor], width: tuple[int, ...], gated: bool
    ) -> list[tuple[NormSpec, _Roles]]:
        """Every spec that gives the module's bits in float32, where the order of casts has no effect."""
        x, gate = self._inputs(torch.float32, width, gated)
        wanted = self._call(self._copy(torch.float32, tensors), x, gate)
        found = []
        for roles, value in itertools.product(self._roles(), eps):
            candidates = in_float32(base.replace(eps=value), roles.weight is not None, roles.bias is not None, gated)
            found += [
                (spec, roles) for spec in candidates if same_bits(wanted, self._expected(spec, roles, tensors, x, gate))
            ]
        if not found:
            if self._divides_by_length(self._copy(torch.float32, tensors), width, gated):
                raise RefusedError(
                    "it divides by the length of a row, as F.normalize does, and not by the root of its mean square "
                    "plus eps"
                )
            raise RefusedError("no NormSpec reproduces it bit for bit in float32")
        return found

    def _divides_by_length(self, module: nn.Module, width: tuple[int, ...], gated: bool) -> bool:
        """Whether even a tiny row is scaled to the same length, which an eps below a root prevents."""
        x = self._randn(2, 3, *width)
        gate = self._gate_like(x) if gated else None
        small, usual = (self._call(module, rows, gate) for rows in (x * _TINY, x))
        return torch.allclose(small, usual, rtol=1e-4, atol=1e-6)

    def _match_casts(
        self, found: list[tuple[NormSpec, _Roles]], tensors: dict[str, Tensor], width: tuple[int, ...], gated: bool
    ) -> tuple[NormSpec, _Roles]:
        """Among the float32 matches, the spec whose casts also give the module's bits in every other dtype."""
        probes = [(dtype, *self._inputs(dtype, width, gated)) for dtype in _HALF_DTYPES]
        outputs = [self._call(self._copy(dtype, tensors), x, gate) for dtype, x, gate in probes]
        for spec, roles in found:
            for candidate in in_half(spec):
                expected = [
                    self._expected(candidate, roles, {k: v.to(d) for k, v in tensors.items()}, x, gate)
                    for d, x, gate in probes
                ]
                if all(map(same_bits, outputs, expected)):
                    return self._settle_float64(candidate, roles, tensors, width, gated), roles
        raise RefusedError("it is an RMS norm in float32, but no order of casts reproduces it in float16 and bfloat16")

    def _settle_float64(
        self, spec: NormSpec, roles: _Roles, tensors: dict[str, Tensor], width: tuple[int, ...], gated: bool
    ) -> NormSpec:
        """Distinguish statistics that stay float32 from those that are float64 for a float64 input.

        An eps of None depends on the dtype, so a module may have another eps in float64.
        """
        alternatives = SAME_IN_HALF[spec.statistics]
        if len(alternatives) == 1:
            return spec
        x, gate = self._inputs(torch.float64, width, gated)
        widened = {name: t.to(torch.float64) for name, t in tensors.items()}
        wanted = self._call(self._copy(torch.float64, tensors), x, gate)
        for statistics in alternatives:
            for eps in dict.fromkeys((spec.eps, torch.finfo(torch.float64).eps)):
                candidate = spec.replace(statistics=statistics, eps=eps)
                if same_bits(wanted, self._expected(candidate, roles, widened, x, gate)):
                    return candidate if self.own_dtype == torch.float64 else candidate.replace(eps=spec.eps)
        if self.own_dtype == torch.float64:
            raise RefusedError("it is an RMS norm in float32, but no NormSpec reproduces it in its own float64")
        return spec

    def _prove(
        self,
        spec: NormSpec,
        roles: _Roles,
        tensors: dict[str, Tensor],
        width: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        for dtype in dtypes:
            if dtype != self.own_dtype and self.own_dtype == torch.float64:
                continue  # eps may depend on the dtype; only the module's own dtype matters
            cast = {name: t.to(dtype) for name, t in tensors.items()}
            module = self._copy(dtype, tensors)
            for leading in ((), (1,), (2, 2)):
                x, gate = self._inputs(dtype, width, spec.has_gate, leading)
                try:
                    wanted = self._call(module, x, gate)
                except Exception:  # the module does not accept this rank, so it is never called with it
                    if leading:
                        continue
                    raise
                if not same_bits(wanted, self._expected(spec, roles, cast, x, gate)):
                    raise RefusedError(f"with its own weights or other shapes it differs from the spec in {dtype}")

    def _prove_conditions(
        self, spec: NormSpec, roles: _Roles, weights: list[dict[str, Tensor]], width: tuple[int, ...]
    ) -> None:
        """Refuse a module that follows the spec in some shapes, strides, magnitudes or modes, and not in others."""
        dtype = self.own_dtype
        own = {name: t.to(dtype) for name, t in weights[1].items()}
        rank = max((t.ndim for t in own.values()), default=0) - len(width)

        pool = self._randn(12, math.prod(width))

        def draw(*leading: int) -> Tensor:
            leading = (1,) * (rank - len(leading)) + leading
            return rolled(pool, math.prod(leading)).reshape(*leading, *width).to(dtype)

        conditions = list(probe_conditions(draw, dtype, width, self.threads, self.generator))
        for tensors, chosen in ((own, conditions), ({k: t.to(dtype) for k, t in weights[0].items()}, conditions[-1:])):
            module = self._copy(dtype, tensors, watch=tensors is own)
            for condition in chosen:
                gates = [self._gate_like(condition.x.detach())] if spec.has_gate else []
                reason = differs(
                    condition,
                    lambda x, module=module, gates=gates: module.forward(x, *gates),  # type: ignore[misc]
                    lambda x, tensors=tensors, gates=gates: self._expected(  # type: ignore[misc]
                        spec, roles, tensors, x, *(gates or [None])
                    ),
                )
                if reason is not None:
                    raise RefusedError(reason)

    def _prove_other_widths(self, spec: NormSpec, roles: _Roles, width: tuple[int, ...]) -> None:
        if self._declared_width(None) is not None:
            return
        for size in WIDTHS_WITHOUT_WEIGHT:
            try:
                self._prove(spec, roles, {}, (*width[:-1], size), self._dtypes())
            except (NotANormError, RuntimeError, ValueError) as error:
                raise RefusedError(f"it has no weight, works at width {width[-1]} and fails at {size}") from error

    def _prove_independent(self, spec: NormSpec, roles: _Roles, width: tuple[int, ...]) -> None:
        """Refuse a module whose result depends on plain tensor attributes."""
        if not self.loose:
            return
        module = self._copy(self.own_dtype, self.tensors)
        vars(module).update({name: self._randn(*t.shape).to(t.dtype) for name, t in self.loose.items()})
        x, gate = self._inputs(self.own_dtype, width, spec.has_gate)
        cast = {name: t.to(self.own_dtype) for name, t in self.tensors.items()}
        if not same_bits(self._call(module, x, gate), self._expected(spec, roles, cast, x, gate)):
            names = ", ".join(self.loose)
            raise RefusedError(f"it reads a tensor that is not a parameter or buffer ({names}); register it as one")

    def _expected(
        self, spec: NormSpec, roles: _Roles, tensors: dict[str, Tensor], x: Tensor, gate: Tensor | None
    ) -> Tensor:
        weight = tensors[roles.weight].to(x.dtype) if roles.weight else None
        bias = tensors[roles.bias].to(x.dtype) if roles.bias else None
        return eager(spec, x, weight, bias, gate if spec.has_gate else None)

    def _inputs(
        self, dtype: torch.dtype, width: tuple[int, ...], gated: bool, leading: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Rows that reveal every rounding and every eps: `[rows, *width]`, or with leading dims before it.

        A weight with leading dims of size 1 gets an x of at least its rank.
        """
        rank = max((t.ndim for t in self.tensors.values()), default=0)
        leading = (1,) * (rank - len(width) - len(leading) - 1) + leading
        rows = adversarial_rows(dtype, width, self.generator).to(self.device)
        rows = rows[: len(rows) // math.prod(leading) * math.prod(leading)]
        x = rows.reshape(*leading, -1, *width)
        return x, self._gate_like(x) if gated else None
