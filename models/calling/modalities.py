"""What a multimodal model of transformers reads besides text, and whether inputs have it (`left_out`)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

# Inputs that are text or belong to it.
TEXT_INPUTS = frozenset(
    {
        "attention_mask",
        "decoder_attention_mask",
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "input_ids",
        "inputs_embeds",
        "mm_token_type_ids",
        "position_ids",
        "token_type_ids",
        "use_cache",
    }
)

# Whether a token is text or an image; some decoders let the tokens of an image attend to each other.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Features of inner layers of an encoder in the places of the tokens, by their number.
DEEP_EMBEDS = "deepstack_embeds_"


def modalities(model: Any) -> list[str]:
    """What a model reads besides text, such as `image`; empty for a model of text, and for one that does not say."""
    found = getattr(model, "input_modalities", None)
    names = [found] if isinstance(found, str) else list(found or ())
    # A model of one modality reads it always, so nothing can be left out.
    return sorted(str(name) for name in names if name != "text") if "text" in names and len(names) > 1 else []


def left_out(model: Any, inputs: Collection[str]) -> list[str]:
    """The modalities of a model that are not among its inputs: all of them, if the inputs are text only."""
    return modalities(model) if set(inputs) <= TEXT_INPUTS else []


def text_only_note(model: Any, inputs: Collection[str]) -> str | None:
    """That an export reads text only, though the model reads more; None if it does not leave anything out."""
    missing = left_out(model, inputs)
    if not missing:
        return None
    what = " and ".join(missing)
    return f"exported without its {what} inputs, so the file reads text only; give example inputs that have them"
