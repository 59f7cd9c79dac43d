"""How the next token is chosen and where a text ends (`generation_config`), by the names that transformers uses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...export.onnx_io.manifest_fields import field_problems
from ...models.errors import UsageError
from .loop import import_transformers


class Settings(BaseModel):
    """Fields of transformers' `GenerationConfig` that a user may set, with the values that make sense.

    The other fields concern its cache, its results, or methods that need more than the logits of the last token.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    do_sample: bool | None = None
    temperature: float | None = Field(None, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    bad_words_ids: list[list[int]] | None = Field(None, min_length=1)
    min_new_tokens: int | None = Field(None, ge=0)
    num_beams: int | None = Field(None, ge=1)
    length_penalty: float | None = Field(None, allow_inf_nan=False)
    early_stopping: bool | Literal["never"] | None = None
    stop_strings: list[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1)


# Those that only matter where tokens are drawn at random.
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_FILE = "generation_config.json"


def generation_config(
    folder: Path | None, settings: Mapping[str, Any], max_new_tokens: int, ends: Collection[int], padding: int
) -> Any:
    """Transformers' `GenerationConfig` of one generation.

    Without `do_sample` or a setting of sampling, each token is the most likely one, whatever the model's own file says.
    With them, the model's generation_config.json supplies what is not set.

    Args:
        folder: of the exported model, or None.
        settings: the fields of `Settings`.
        max_new_tokens: the most new tokens.
        ends: token ids that end a text.
        padding: the token id that fills rows that ended.

    Raises:
        UsageError: a setting is unknown or has a wrong value.
        EnvironmentMissingError: transformers is not installed.
    """
    unknown = [name for name in settings if name not in Settings.model_fields]
    if unknown:
        raise UsageError(f"{', '.join(unknown)}: expected settings of {', '.join(Settings.model_fields)}.")
    try:
        given = Settings(**settings).model_dump(exclude_none=True)
    except ValidationError as error:
        raise UsageError(f"generation settings: {field_problems(error)}.") from error
    sampled = bool(given.get("do_sample", any(name in given for name in _OF_SAMPLING)))
    useless = [name for name in _OF_SAMPLING if name in given]
    if useless and not sampled:
        raise UsageError(f"{', '.join(useless)}: expected do_sample=True with it, got do_sample=False.")
    wanted = {
        **(_own_settings(folder) if sampled else {}), **given, "do_sample": sampled, "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(ends) or None, "pad_token_id": padding, "use_cache": False,
    }  # fmt: skip
    return import_transformers().GenerationConfig(**wanted)


def _own_settings(folder: Path | None) -> dict[str, Any]:
    """What the model's own file says of sampling."""
    from ...models.regular_files import read_json

    if folder is None or not (folder / _FILE).is_file():
        return {}
    content = read_json(folder / _FILE, "Export the model again.")
    known = content if isinstance(content, dict) else {}
    return {name: known[name] for name in (*_OF_SAMPLING, "repetition_penalty") if known.get(name) is not None}
