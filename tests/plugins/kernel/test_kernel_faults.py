"""The faults of `benchmarks/kernel_faults.py` fit the source of today, and a sample of them is found."""

from __future__ import annotations

import pytest

from benchmarks.kernel_faults import CHECKS, Fault, failure, faults, found, line_of
from rmsnorm_deploy.plugins.kernel.norm_kernel import SOURCE_FOLDER

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and NVRTC: pip install 'rmsnorm-deploy[kernel]'")


def test_every_fault_is_in_the_source_once() -> None:
    planted = faults()
    assert len({fault.what for fault in planted}) == len(planted)
    assert sum(fault.device_only for fault in planted) >= 40
    assert all(line_of(fault) > 0 for fault in planted)
    assert {name for fault in planted for name in fault.checks} <= set(CHECKS)


@pytest.mark.parametrize("fault", faults()[::12], ids=lambda fault: fault.what)
def test_faults_are_found(fault: Fault) -> None:
    assert failure(fault.checks[0], SOURCE_FOLDER) is None
    assert found(fault) is not None


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("cvt.rni.s32.f32", 4)])
def test_a_text_that_is_not_there_once_is_an_error(old: str, count: int) -> None:
    with pytest.raises(ValueError, match=rf"expected .* once in numbers\.cuh, got {count} times"):
        line_of(Fault("none", "numbers.cuh", old, "", ("block",)))
