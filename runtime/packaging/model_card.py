"""The README.md of a model on the hub (`model_card`): what it is, how it was validated, and how to run it.

Everything in it is from the manifest and the report of the validation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..report.text import printable

FILE = "README.md"
# The mark of a card that this package wrote, by which a later push knows that it may be replaced.
MARK = "<!-- rmsnorm_deploy.card/1 -->"
# The tensors of the KV cache have one row together.
_CACHE = re.compile(r"^(past_key_values|present)\..*")
_ROWS = 20
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(name: str, manifest: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> str:
    """The text of the card, in Markdown behind a block of YAML.

    Args:
        name: the hub name that it gets.
        manifest: of the exported folder or package.
        report: of `rmsnorm validate`, as JSON values.
    """
    server = (manifest.get("package") or {}).get("for")
    parts = [
        f"---\n{_metadata(manifest)}\n---",
        MARK,
        f"# {_plain(name.rpartition('/')[2])}",
        _what(manifest, server),
        _table((("", ""), *_facts(manifest))),
        "## Validation",
        _validation(report),
        "## Run it",
        _commands(name, manifest, server),
        "## Versions",
        ", ".join(f"{_plain(key)} {_plain(text)}" for key, text in (manifest.get("versions") or {}).items()) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(manifest: Mapping[str, Any]) -> str | None:
    """The hub name of the model that was exported; None for another source."""
    name = (manifest.get("hub") or {}).get("name")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _metadata(manifest: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    library = "tensorrt" if str(manifest.get("model", "")).endswith((".engine", ".plan")) else "onnx"
    tags = ["rmsnorm", "rmsnorm-deploy", library, *(manifest.get(key) for key in ("target", "dtype"))]
    if manifest.get("quantized"):
        tags.append(manifest["quantized"].get("profile"))
    own = [str(tag) for tag in dict.fromkeys(tags) if tag and re.fullmatch(r"[\w.-]+", str(tag))]
    return str(ModelCardData(library_name=library, base_model=base_model(manifest), tags=own).to_yaml()).strip()


def _what(manifest: Mapping[str, Any], server: Any) -> str:
    name, hub = base_model(manifest), manifest.get("hub") or {}
    of = f"[{name}](https://huggingface.co/{name})" if name else "A PyTorch model"
    commit = f", commit {_code(hub['commit'])}" if name and hub.get("commit") else ""
    kind = f", as a folder for {_code(server)}" if server else ""
    norms = "its RMSNorms are in the form that the runtime executes best."
    return f"{of}{commit}, exported with rmsnorm-deploy{kind}: {norms}"


def _facts(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    sites = manifest.get("sites") or ()
    yield "target", _code(manifest.get("target", "-"))
    yield "dtype", _code(manifest.get("dtype", "-"))
    yield "opset", _code(manifest.get("opset", "-"))
    yield "norms", f"{len(sites)} ({len(manifest.get('refusals') or ())} left as they were)"
    yield "KV cache", "input and output" if manifest.get("with_past") else "none"
    if manifest.get("quantized"):
        yield "quantized", _code(manifest["quantized"].get("profile"))
    parts = manifest.get("components") or list(manifest.get("models") or ())
    if parts:
        yield "models", ", ".join(map(_code, parts))
    for package, version in (manifest.get("requires") or {}).items():
        yield f"requires {_plain(package)}", _code(version)


def _validation(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "No validation report is in this repository. Compare it with PyTorch with `rmsnorm validate`."
    lossy = (report.get("settings") or {}).get("lossy")
    judged = f"by the limits of the profile {_code(lossy)}" if lossy else "by the error of PyTorch in the same dtype"
    verdict, created = _plain(report.get("verdict")), _plain(report.get("created"))
    first = f"Verdict: **{verdict}**, {judged}, with a float64 reference ({created})."
    rows = _largest(report.get("outputs") or ())
    table = _table((("output", "cases", "largest error", "largest error / RMS of its row"), *rows)) if rows else ""
    checked = ", ".join(
        f"{sum(row.get('passed') is True for row in report.get(kind) or ())} of {len(report.get(kind) or ())} {kind}"
        for kind in ("norms", "attentions", "segments")
        if report.get(kind)
    )
    alone = f"Checked alone: {checked} passed." if checked else ""
    return "\n\n".join(text for text in (first, _plain(report.get("summary") or ""), table, alone) if text)


def _largest(outputs: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Each output with the largest errors of all its cases."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in outputs:
        groups.setdefault(_CACHE.sub(r"\1.*", str(row["name"])), []).append(row)
    found = []
    for name, rows in list(groups.items())[:_ROWS]:
        errors = [_worst(rows, key) for key in ("max_abs", "max_rel_row")]
        found.append((_code(name), str(len({row.get("case") for row in rows})), *errors))
    return found


def _worst(rows: Iterable[Mapping[str, Any]], key: str) -> str:
    values = [float(value) for row in rows if (value := (row.get("figures") or {}).get(key)) is not None]
    if not values:
        return "-"
    return f"{math.nan if any(map(math.isnan, values)) else max(values):.3g}"


def _commands(name: str, manifest: Mapping[str, Any], server: Any) -> str:
    folder = _folder_name(name)
    engine = str(manifest.get("model", "")).endswith((".engine", ".plan"))
    target = f"{folder}/{manifest['model']}" if engine else folder
    runs = "generate" if manifest.get("with_past") and not engine else "run"
    given = {"generate": '--prompt "..."', "run": "--inputs inputs.npz -o outputs.npz"}[runs]
    last = f"# {_SERVERS[server]}" if server in _SERVERS else f"rmsnorm {runs} {target} {given}"
    return f"```\nhf download {name} --local-dir {folder}\nrmsnorm verify {folder}\n{last}\n```"


_SERVERS = {
    "genai": "then open the folder with onnxruntime_genai.Model",
    "triton": "then start the script in the folder, which runs Triton Inference Server",
    "trtexec": "then start the script in the folder, which builds the engine",
    "ort-server": "then start the script in the folder, which serves the model",
}


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "-", name.rpartition("/")[2]) or "model"


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    first, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, f"|{' --- |' * (first.count(' | ') + 1)}", *rest])


def _plain(value: Any) -> str:
    """A text of others, without the characters that Markdown and HTML obey."""
    text = " ".join(printable(str(value)).split())[:400]
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", text)


def _code(value: Any) -> str:
    """A text of others as code."""
    text = " ".join(printable(str(value)).split())[:120]
    return f"`{text.replace('`', '').replace('|', '/') or '-'}`"
