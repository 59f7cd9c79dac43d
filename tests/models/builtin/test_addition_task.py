"""The addition task: its text, its held-out split, its solver, its training and the shipped checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rmsnorm_deploy.models.builtin import addition_task as addition
from rmsnorm_deploy.models.builtin import train_addition
from rmsnorm_deploy.models.builtin.addition_task import (
    VOCABULARY,
    Ids,
    Problem,
    TaskAccuracy,
    accuracy,
    decode,
    draw,
    encode,
    held_out,
    problems,
    solve,
    torch_step,
)
from rmsnorm_deploy.models.builtin.checkpoint import addition as shipped_decoder
from rmsnorm_deploy.models.builtin.checkpoint import load_decoder
from rmsnorm_deploy.models.errors import RmsnormDeployError, UsageError


def perfect_step(ids: Ids) -> np.ndarray:
    """A model that adds: the next digit's logit is 1 at the last position, everything else is 0."""
    logits = np.zeros((*ids.shape, len(VOCABULARY)), dtype=np.float16)
    for row, text in enumerate(decode(ids)):
        prompt, written = text[:8], text[8:]
        answer = f"{int(prompt[:3]) + int(prompt[4:7]):04d}"
        logits[row, -1, int(answer[::-1][len(written)])] = 1
    return logits


def wrong_below_500(ids: Ids) -> np.ndarray:
    """As `perfect_step`, but the last answer digit is wrong where the first number is below 500."""
    logits = perfect_step(ids)
    if ids.shape[1] == 8:
        logits[ids[:, 0] < 5, -1] = np.roll(logits[ids[:, 0] < 5, -1], 1, axis=-1)
    return logits


# ------------------------------------------------------------------------------------------------------------- text


def test_problem_text() -> None:
    problem = Problem(12, 345)
    assert (problem.prompt, problem.answer) == ("012+345=", "0357")
    assert Problem(999, 999).answer == "1998"


@pytest.mark.parametrize(("left", "right"), [(1000, 0), (0, 1000), (-1, 5)])
def test_problem_out_of_range(left: int, right: int) -> None:
    with pytest.raises(UsageError, match="out of range; both numbers must be 0 to 999"):
        Problem(left, right)


def test_encode_and_decode_are_inverse() -> None:
    texts = [problem.prompt + problem.answer for problem in problems(50)]
    ids = encode(texts)
    assert ids.dtype == np.int64
    assert ids.shape == (50, 12)
    assert decode(ids) == texts
    assert encode(["0+9="]).tolist() == [[0, 10, 9, 11]]


def test_encode_refuses() -> None:
    with pytest.raises(UsageError, match="no text to encode"):
        encode([])
    with pytest.raises(UsageError, match="'12' and '1' differ in length"):
        encode(["1", "12"])
    with pytest.raises(UsageError, match=r"'1-2' has '-'; the vocabulary is"):
        encode(["1-2"])


def test_decode_refuses() -> None:
    with pytest.raises(UsageError, match=r"expected shape \[batch, seq\], got \[3\]"):
        decode(np.zeros(3, dtype=np.int64))
    for bad in (-1, len(VOCABULARY)):
        with pytest.raises(UsageError, match="expected 0 to 11, got"):
            decode(np.array([[bad, 0 if bad < 0 else 1]]))


# ------------------------------------------------------------------------------------------------------------ split


def test_one_problem_in_ten_is_held_out_on_both_sides_of_the_plus() -> None:
    left, right = np.divmod(np.arange(1_000_000), 1000)
    kept = held_out(left, right)
    assert kept.sum() == 100_011  # a fixed rule: another figure means another split, and a checkpoint that cheats
    assert (kept == held_out(right, left)).all()
    for digit in range(10):  # no digit is favored, so that the held-out problems are as hard as the others
        assert 0.09 < kept[left % 10 == digit].mean() < 0.11
        assert 0.09 < kept[left // 100 == digit].mean() < 0.11


def test_training_and_held_out_problems_are_disjoint() -> None:
    rng = np.random.default_rng(0)
    train = set(zip(*(numbers.tolist() for numbers in draw(rng, 50_000, test=False)), strict=True))
    test = {(problem.left, problem.right) for problem in problems(20_000)}
    assert len(train) > 40_000
    assert len(test) > 10_000
    assert not train & (test | {(right, left) for left, right in test})


def test_training_batches_are_text_with_reversed_answers_and_never_held_out() -> None:
    batch = train_addition.training_batch(np.random.default_rng(1), 300)
    assert batch.shape == (300, 12)
    for text in decode(batch.numpy()):
        problem = Problem(int(text[:3]), int(text[4:7]))
        assert text == problem.prompt + problem.answer[::-1]
        assert not held_out(np.array(problem.left), np.array(problem.right))


def test_problems_are_deterministic() -> None:
    assert problems(30, seed=4) == problems(30, seed=4)
    assert problems(30, seed=4) != problems(30, seed=5)
    assert len(problems(1)) == 1
    with pytest.raises(UsageError, match="expected at least 1 problem, got 0"):
        problems(0)


# ----------------------------------------------------------------------------------------------------------- solver


def test_solve_gives_answers_the_right_way_round() -> None:
    assert solve(perfect_step, ["012+345=", "999+001=", "000+000="]) == ["0357", "1000", "0000"]


def test_solve_reads_the_last_position_and_grows_by_one_token() -> None:
    lengths = []

    def step(ids: Ids) -> np.ndarray:
        lengths.append(ids.shape[1])
        return perfect_step(ids)

    solve(step, ["123+456="])
    assert lengths == [8, 9, 10, 11]


@pytest.mark.parametrize("prompt", ["12+345=", "0123+45=", "012+345", "012-345=", "012+345=0", "+12+345=", "٠١٢+345="])
def test_solve_refuses_what_is_no_problem(prompt: str) -> None:
    with pytest.raises(UsageError, match="expected two numbers of 3 digits"):
        solve(perfect_step, ["012+345=", prompt])


def test_solve_refuses_no_prompt_and_what_are_no_logits() -> None:
    with pytest.raises(UsageError, match="no text to encode"):
        solve(perfect_step, [])
    with pytest.raises(UsageError, match=r"logits of the model: expected shape \[1, 8, 12\], got \[1, 12\]"):
        solve(lambda ids: perfect_step(ids)[:, -1], ["012+345="])


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_accuracy_counts_whole_answers_in_any_batch_size(batch_size: int) -> None:
    asked = problems(100)
    right = sum(problem.left >= 500 for problem in asked)
    assert 0 < right < 100
    assert accuracy(perfect_step, asked, batch_size) == TaskAccuracy(100, 100)
    result = accuracy(wrong_below_500, asked, batch_size)
    assert result == TaskAccuracy(right, 100)
    assert result.fraction == right / 100


def test_accuracy_refuses() -> None:
    with pytest.raises(UsageError, match="no problem to solve"):
        accuracy(perfect_step, [])
    with pytest.raises(UsageError, match="batch_size: expected at least 1, got 0"):
        accuracy(perfect_step, problems(1), 0)


def test_the_task_needs_no_torch() -> None:
    code = f"import sys; import {addition.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------- shipped decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shipped_decoder_solves_held_out_problems(dtype: torch.dtype) -> None:
    result = accuracy(torch_step(shipped_decoder().to(dtype)), problems(200))
    assert result.total == 200
    assert result.fraction >= 0.99


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_addition, "BATCH_SIZE", 32)
    monkeypatch.setattr(train_addition, "TEST_PROBLEMS", 20)
    monkeypatch.setattr(train_addition, "REPORT_EVERY", 10)


@pytest.mark.usefixtures("small_training")
def test_training_lowers_the_loss_and_repeats_itself() -> None:
    lines: list[str] = []
    model, losses = train_addition.train(steps=20, seed=1, report=lines.append)
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert [line.split(":")[0] for line in lines] == ["step 10/20", "step 20/20"]
    again, losses_again = train_addition.train(steps=20, seed=1)
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert train_addition.train(steps=1, seed=2)[1] != losses[:1]
    assert model.norm.weight.std() > 0


@pytest.mark.usefixtures("small_training")
def test_command_saves_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_addition.main(["--output", str(tmp_path / "new"), "--steps", "2"]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    assert load_decoder(tmp_path / "new").config == train_addition.CONFIG
    output = capsys.readouterr()
    assert output.out == ""
    assert "held-out problems solved: 0 of 20 (0.00%)" in output.err


@pytest.mark.usefixtures("small_training")
def test_failed_training_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_addition, "learning_rate", lambda step, steps: float("nan"))
    with pytest.raises(RmsnormDeployError, match="the loss is nan at step 2; train with another --seed"):
        train_addition.train(steps=4)
    assert train_addition.main(["--output", str(tmp_path / "new"), "--steps", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: the loss is nan at step 2")
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    assert train_addition.main(["--output", str(tmp_path / "taken")]) == 2
    assert "taken is a file; give a folder" in capsys.readouterr().err
    assert train_addition.main(["--output", str(tmp_path / "new"), "--steps", "0"]) == 2
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [train_addition.learning_rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(train_addition.PEAK_LEARNING_RATE / train_addition.WARMUP_STEPS)
    assert max(rates) == rates[99] == rates[100] == train_addition.PEAK_LEARNING_RATE
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.01 * train_addition.PEAK_LEARNING_RATE, rel=0.01)
