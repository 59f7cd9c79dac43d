"""The configuration of onnxruntime-genai for an exported decoder (`genai_config`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...export.graph.cache_names import is_past
from ...export.onnx_io.manifest import read_manifest
from ...models.errors import UnsupportedError, UsageError
from ...models.regular_files import read_json
from ..inputs.tokenizer import end_tokens

FILE = "genai_config.json"
_KNOWN = ("input_ids", "attention_mask", "position_ids")
_PAST, _PRESENT = "past_key_values.{}.{}", "present.{}.{}"
_KINDS = ("key", "value")
# Its name of a decoder that reads tokens and a cache, whatever the architecture.
_TYPE = "decoder"
_LONGEST = 1 << 15


def genai_config(folder: Path) -> dict[str, Any]:
    """What onnxruntime-genai must know of the decoder in an exported folder.

    Args:
        folder: an exported folder, with the model's config.json.

    Raises:
        UnsupportedError: it is not a decoder of text with a cache of keys and values.
        UsageError: config.json is missing, or does not say what is needed.
    """
    manifest = read_manifest(folder)
    layers, width = _cache_of(folder, manifest)
    config = _config_of(folder)
    heads = _number(config, "num_attention_heads", folder)
    vocabulary = next(row["shape"][-1] for row in manifest["outputs"] if row["name"] == "logits")
    if not isinstance(vocabulary, int):
        vocabulary = _number(config, "vocab_size", folder)
    names = [row["name"] for row in manifest["inputs"] if row["name"] in _KNOWN]
    ends = sorted(end_tokens(folder))
    if not ends:
        raise UsageError(
            f"{folder}: expected an eos_token_id in generation_config.json or config.json, which onnxruntime-genai "
            "requires, got none. Set it in the checkpoint and export again."
        )
    first = next(row for row in manifest["inputs"] if is_past(row["name"]))
    shares = set(manifest.get("in_place_cache") or ()) == {
        row["name"] for row in manifest["inputs"] if is_past(row["name"])
    }
    longest = int(config.get("max_position_embeddings") or _LONGEST)
    padding = config.get("pad_token_id")
    beginning = config.get("bos_token_id")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": manifest.get("model", "model.onnx"),
        "head_size": width,
        "hidden_size": _number(config, "hidden_size", folder),
        "inputs": {**{name: name for name in names}, **_names("past", _PAST)},
        "outputs": {"logits": "logits", **_names("present", _PRESENT)},
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": first["shape"][1],
    }
    return {
        "model": {
            "type": _TYPE,
            "bos_token_id": beginning if isinstance(beginning, int) else ends[0],
            "eos_token_id": ends,
            "pad_token_id": padding if isinstance(padding, int) else ends[0],
            "vocab_size": vocabulary,
            "context_length": longest,
            "decoder": decoder,
        },
        "search": _search(folder, longest, shares),
    }


def genai_notes(folder: Path) -> list[str]:
    """What a user of onnxruntime-genai must know of the decoder in an exported folder."""
    config = _config_of(folder)
    window = config.get("sliding_window")
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return []
    return [
        f"the model has a sliding window of {window} tokens, in which the padding counts that onnxruntime-genai puts "
        "behind shorter prompts: give it batches of prompts of one length"
    ]


def _names(kind: str, pattern: str) -> dict[str, str]:
    return {f"{kind}_{name}_names": pattern.format("%d", name) for name in _KINDS}


def _cache_of(folder: Path, manifest: dict[str, Any]) -> tuple[int, int]:
    """The number of layers of the cache, and the size of its heads."""
    if manifest.get("components"):
        raise UnsupportedError(
            f"{folder}: expected one decoder, got several models: {', '.join(manifest['components'])}. Package for "
            "triton, or package a decoder of text."
        )
    rows = {row["name"]: row for row in manifest["inputs"]}
    outputs = {row["name"] for row in manifest["outputs"]}
    cache = [name for name in rows if is_past(name)]
    layers = len(cache) // len(_KINDS)
    wanted = [_PAST.format(layer, kind) for layer in range(layers) for kind in _KINDS]
    others = sorted(set(rows) - set(_KNOWN) - set(cache))
    foreign = [*others, *sorted(set(cache) - set(wanted))]
    if not cache or sorted(cache) != sorted(wanted) or others or "logits" not in outputs or "input_ids" not in rows:
        raise UnsupportedError(
            f"{folder}: expected a decoder that reads {', '.join(_KNOWN)} and keys and values of each layer, and "
            f"returns logits, got the inputs {', '.join(foreign[:4]) or 'of no cache'}. "
            "Export a decoder with --with-past."
        )
    shapes = {tuple(rows[name]["shape"][1::2]) for name in cache}
    if len(shapes) > 1 or not all(isinstance(size, int) for size in next(iter(shapes))):
        raise UnsupportedError(
            f"{folder}: expected keys and values of one number and size of heads in all layers, as onnxruntime-genai "
            f"does, got {' and '.join(map(str, sorted(shapes, key=str)))}."
        )
    return layers, next(iter(shapes))[1]


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(
            f"{folder}: expected the model's config.json beside the file, got none. Export from a checkpoint's "
            "folder or a hub name."
        )
    config = read_json(path, "Export the model again.")
    if not isinstance(config, dict):
        raise UsageError(f"{path}: expected a JSON object, got {type(config).__name__}. Export the model again.")
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def _number(config: dict[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{folder / 'config.json'}: {name}: expected a positive integer, got {value!r}.")
    return value


def _search(folder: Path, longest: int, shares: bool) -> dict[str, Any]:
    """The defaults of a generation: those of generation_config.json, and how the cache is kept."""
    path = folder / "generation_config.json"
    given = read_json(path, "Export the model again.") if path.is_file() else {}
    given = given if isinstance(given, dict) else {}
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "no_repeat_ngram_size")
    own = {name: given[name] for name in names if isinstance(given.get(name), int | float)}
    return {"do_sample": False, **own, "max_length": longest, "past_present_share_buffer": shares}
