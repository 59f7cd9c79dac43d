"""One model in one dtype with its norms in one form (`Row`), and its stages one after the other (`examine`)."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from . import stages

FAMILIES: Final = ("llama", "qwen3", "gemma3")
DTYPES: Final = ("float32", "float16", "bfloat16")
NORMS: Final = ("native", "plugin")
QUICK: Final = "quick"
PASSED, FAILED, LEFT_OUT = "pass", "fail", "not run"
# Called with the name of a stage that begins and None, and again with its result.
Report = Callable[[str, dict[str, Any] | None], None]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        runtime: `tensorrt` or `rtx`.
        family: a key of `tests.helpers.models.families.FAMILIES`.
        dtype: of the model.
        norms: `native`, `plugin`, or `quick` for the quick deployable plugins.
        plugin: see `BuildOptions`.
        deep: whether every norm is validated too.
    """

    runtime: str
    family: str
    dtype: str
    norms: str
    plugin: str = "auto"
    deep: bool = False

    @property
    def name(self) -> str:
        """The name that `--only` selects by."""
        return f"{self.runtime}/{self.family}/{self.dtype}/{self.norms}"

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace("/", "-")

    @property
    def steps(self) -> dict[str, stages.Stage]:
        """The stages by name, in their order."""
        return stages.QUICK_STAGES if self.norms == QUICK else stages.STAGES


def all_rows(runtimes: Sequence[str], plugin: str = "auto") -> list[Row]:
    """Every row of these products; half precision first, so that a short budget shows what is deployed."""
    rows = []
    for runtime in runtimes:
        order = [(family, dtype) for dtype in ("float16", "bfloat16", "float32") for family in FAMILIES]
        assert {dtype for _, dtype in order} == set(DTYPES)
        rows += [Row(runtime, family, dtype, norms, plugin) for family, dtype in order for norms in NORMS]
        if runtime == "tensorrt":
            rows.append(Row(runtime, "llama", "float16", QUICK, plugin))
    return rows


def examine(row: Row, folder: Path, report: Report) -> None:
    """Run every stage of a row. One that fails does not stop those that need only what the earlier ones left.

    Args:
        row: the row.
        folder: an empty folder for its files.
        report: see `Report`.
    """
    state = stages.State(row.runtime, row.family, row.dtype, row.norms, row.plugin, row.deep, folder)
    for name, stage in row.steps.items():
        if name not in stages.FIRST and not state.engine.is_file():
            report(name, {"state": LEFT_OUT, "text": "there is no engine", "seconds": 0.0, "figures": {}})
            continue
        report(name, None)
        began = time.perf_counter()
        result: dict[str, Any] = {"state": FAILED, "figures": {}}
        try:
            outcome = stage(state)
            result |= {"text": outcome.text, "figures": outcome.figures}
            result["state"] = PASSED if outcome.passed else FAILED
        except Exception as error:  # the other stages and rows still run
            first = (str(error).strip().splitlines() or [""])[0]
            result |= {"text": f"{type(error).__name__}: {first}"[:600], "traceback": traceback.format_exc()}
        report(name, {**result, "seconds": round(time.perf_counter() - began, 2)})
    with contextlib.suppress(Exception):
        state.close()


def passed(results: dict[str, dict[str, Any]], row: Row) -> bool:
    """Whether every stage of a row ran and passed."""
    return [name for name in row.steps if results.get(name, {}).get("state") != PASSED] == []
