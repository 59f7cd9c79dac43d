"""All entries, by name."""

from __future__ import annotations

from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .entries import Entry
from .hybrids import HYBRIDS
from .libraries import LIBRARIES
from .multimodal import MULTIMODAL
from .states import STATES

ENTRIES: dict[str, Entry] = {
    entry.name: entry for entry in (*DECODERS, *HYBRIDS, *ENCODER_DECODERS, *MULTIMODAL, *ENCODERS, *STATES, *LIBRARIES)
}
