"""Every fault of the suite, by family."""

from __future__ import annotations

from .faults import Fault, of_family
from .model_faults.attention_faults import ATTENTION_FAULTS
from .model_faults.cache_faults import CACHE_FAULTS
from .model_faults.encoder_decoder_faults import ENCODER_DECODER_FAULTS
from .model_faults.file_faults import FILE_DATA_FAULTS
from .model_faults.node_faults import NODE_FAULTS
from .model_faults.position_faults import FAULTS_OF_POSITIONS
from .model_faults.token_faults import TOKEN_FAULTS
from .model_faults.value_faults import VALUE_FAULTS
from .norm_faults import NORM_FAULTS
from .runner_faults import RUNNER_FAULTS, RunnerFault
from .segment_faults import SEGMENT_FAULTS

_BY_FAMILY: dict[str, tuple[Fault, ...]] = {
    **NORM_FAULTS,
    **SEGMENT_FAULTS,
    **ATTENTION_FAULTS,
    **NODE_FAULTS,
    **FAULTS_OF_POSITIONS,
    **CACHE_FAULTS,
    **TOKEN_FAULTS,
    **ENCODER_DECODER_FAULTS,
    **FILE_DATA_FAULTS,
    **VALUE_FAULTS,
}
FAMILIES: dict[str, tuple[Fault | RunnerFault, ...]] = {
    **{name: of_family(name, faults) for name, faults in _BY_FAMILY.items()},
    "runner": RUNNER_FAULTS,
}
"""The faults of each family."""

FILE_FAULTS: tuple[Fault, ...] = tuple(
    fault for faults in FAMILIES.values() for fault in faults if isinstance(fault, Fault)
)
"""Every fault that is planted in a file."""
