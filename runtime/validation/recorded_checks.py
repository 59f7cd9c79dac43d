"""Check the norms that the export found outside of modules (`check_recorded`).

PyTorch has no module that can be run alone, and its run does not show these norms. Each one is run alone in the file,
on the values that it has there and on adversarial rows, and is compared with the formula that the export recorded and
the weight of the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...export.graph.metadata import IN_GRAPH
from ...models.recognition.site import norm_name
from ..accuracy.tolerances import NORMS
from ..norms.access import CalledNorm, NormAccess, windows
from ..norms.activation_store import ActivationStore, Key
from ..norms.recorded_norms import RecordedNorms, recorded_call
from ..runners.base import Array
from .candidate import Candidate
from .norm_checks import NormCheck, Progress, check_norms, failed, try_or_note, with_cause
from .options import ValidationOptions

if TYPE_CHECKING:
    from torch import nn


def check_recorded(
    candidate: Candidate,
    access: NormAccess,
    model: nn.Module,
    called: Mapping[Key, CalledNorm],
    feeds: Mapping[str, Array],
    options: ValidationOptions,
    progress: Progress,
) -> tuple[list[NormCheck], list[str]]:
    """The checks of these norms, and notes on what could not be checked.

    Args:
        candidate: the side that is checked.
        access: its norms.
        model: the PyTorch model.
        called: the modules that it called, which are checked as such.
        feeds: the file's inputs.
        options: the options of the validation.
        progress: called with a line of text at each step.
    """
    keys = [key for key in access.recorded if key not in called]
    notes = _missing(candidate, access)
    if not keys:
        return [], notes
    norms = RecordedNorms(model, access, keys)
    notes += [f"{norm_name(*key)} could not be checked alone: {reason}" for key, reason in norms.problems.items()]
    notes += norms.notes

    def checked() -> list[NormCheck]:
        parts = windows(norms.keys, options.window)
        return [check for part in parts for check in _checked(part, access, norms, feeds, options, progress)]

    checks = [with_cause(check, access, norms) for check in try_or_note("norms outside of modules", notes, checked)]
    unused = access.unused
    return [failed(c, "its result is not read in the file") if c.norm.key in unused else c for c in checks], notes


def _missing(candidate: Candidate, access: NormAccess) -> list[str]:
    """A note for each norm outside of modules that the manifest names and that cannot be cut out of the file."""
    present = {path for path, _ in access.keys}
    paths = [row["path"] for row in candidate.manifest.get("sites", ()) if row.get("found") == IN_GRAPH]
    absent = "no node of the candidate names this norm in its metadata"
    return [
        f"{norm_name(path)} could not be checked alone: {access.problems.get(path, absent)}"
        for path in paths
        if path not in present or path in access.problems
    ]


def _checked(
    keys: list[Key],
    access: NormAccess,
    norms: RecordedNorms,
    feeds: Mapping[str, Array],
    options: ValidationOptions,
    progress: Progress,
) -> list[NormCheck]:
    asked: dict[Key, CalledNorm] = {}
    with ActivationStore() as store:

        def keep(key: Key, role: str, value: Array) -> None:
            store.put(key, f"fed_{role}", value)
            if role == "x":
                asked[key] = recorded_call(key, access, value.shape)

        progress(f"the inputs of {len(keys)} norms outside of modules")
        access.trace(feeds, keys, keep)
        calls, limits = list(asked.values()), options.all_limits.get(NORMS)
        return check_norms(access, norms, calls, store, options.seed, progress, limits)
