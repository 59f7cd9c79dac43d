"""The zoo's entries: every one that can be built is recognized exactly; the quick ones go through all steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.zoo import isolation, table
from benchmarks.zoo.catalog import ENTRIES
from benchmarks.zoo.entries import KINDS, norms_there, padded_prompt
from benchmarks.zoo.rows import Step, run_row
from benchmarks.zoo.run import main
from benchmarks.zoo.tokens import STEPS, Greedy, difference, torch_tokens
from rmsnorm_deploy.models.errors import UsageError
from rmsnorm_deploy.models.recognition.find_norms import find_norms
from tests.helpers.extent import EVERY

QUICK = [name for name, entry in ENTRIES.items() if entry.quick]
OTHER_LIBRARIES = [name for name, entry in ENTRIES.items() if entry.requires]


def test_the_table_is_large_and_every_kind_has_rows() -> None:
    counts = Counter(entry.kind for entry in ENTRIES.values())
    assert sum(counts.values()) >= 150
    assert set(counts) == set(KINDS)
    assert len(QUICK) == 4  # each takes about 20 s


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in OTHER_LIBRARIES])
def test_the_norms_found_are_the_norms_there(name: str) -> None:
    entry = ENTRIES[name]
    try:
        model = entry.make()
    except ImportError as error:
        pytest.skip(f"a library is not installed: {error}")
    assert len(find_norms(model).sites) == norms_there(entry, model)


@pytest.mark.parametrize("name", QUICK if EVERY else QUICK[:1])
def test_a_quick_entry_goes_through_all_steps(name: str) -> None:
    steps = ("export", "validate", "cache", "tokens") if ENTRIES[name].kind in ("decoder", "state") else (
        "export", "validate")  # fmt: skip
    results = list(run_row(name, steps))
    assert [(result.step, result.status) for result in results] == [(step, "ok") for step in steps], results


@pytest.mark.parametrize("name", OTHER_LIBRARIES)
def test_a_missing_library_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, ENTRIES[name].requires, None)
    (result,) = run_row(name, ["recognize"])
    assert (result.step, result.status) == ("build", "not installed")
    assert ENTRIES[name].requires in result.detail


def test_a_token_that_differs_is_found_and_a_tie_is_named() -> None:
    model = ENTRIES["llama"].make()
    wanted = torch_tokens(model, padded_prompt())
    assert wanted.tokens.shape == (2, STEPS)
    assert difference(wanted, wanted.tokens) == (True, "")
    got = wanted.tokens.copy()
    got[1, 5] += 1
    margins = np.full((2, STEPS), 0.5)
    assert difference(Greedy(wanted.tokens, margins, [], None), got) == (
        False, "row 1 differs from step 5 on, with a margin of 0.5 (not a tie)",
    )  # fmt: skip
    margins[1, 5] = 1e-6
    assert difference(Greedy(wanted.tokens, margins, [], None), got) == (
        True, "row 1 differs from step 5 on, with a margin of 1e-06 (a tie)",
    )  # fmt: skip


def test_padding_changes_no_token_of_the_other_row() -> None:
    model = ENTRIES["llama"].make()
    prompt = padded_prompt()
    alone = {name: value[1:] for name, value in prompt.items()}
    assert torch.equal(
        torch.from_numpy(torch_tokens(model, prompt).tokens[1:]), torch.from_numpy(torch_tokens(model, alone).tokens)
    )


def test_a_hang_costs_one_row() -> None:
    (result,) = isolation.isolated("llama", ["export"], limit=0.01)
    assert result == Step("export", "failed", "exceeded the limit of 0 seconds", 0.01)


def test_a_run_continues_from_its_file_and_fails_on_wrong_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "zoo.json"
    good, bad = Step("export", "ok", "5 norms").to_dict(), Step("tokens", "wrong", "row 0 differs").to_dict()
    table.write(file, {"llama": [good]})
    assert main(["--only", "llama", "--json", str(file)]) == 0
    table.write(file, {"llama": [good, bad]})
    assert main(["--only", "llama", "--json", str(file), "--markdown", str(tmp_path / "zoo.md")]) == 1
    assert "tokens equal in 0 of 1 decoders; wrong: llama" in capsys.readouterr().out
    assert "| llama | decoder | - | ok | - | - | wrong | - |" in (tmp_path / "zoo.md").read_text(encoding="utf-8")


def test_a_foreign_file_and_an_unknown_step_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match=r"expected a JSON file with schema rmsnorm_deploy\.zoo/1"):
        table.read(file)
    assert main(["--json", str(file)]) == 2
    assert main(["--steps", "export,fly"]) == 2
    assert "expected some of recognize,export,validate,cache,tokens,upstream, got fly" in capsys.readouterr().err
