"""Every fault that is planted in a file."""

from __future__ import annotations

from .faults import Fault
from .norm_faults import NORM_FAULTS
from .segment_faults import SEGMENT_FAULTS

FILE_FAULTS: tuple[Fault, ...] = (*NORM_FAULTS, *SEGMENT_FAULTS)
