"""`python -m benchmarks.norms_compared`: the variants, what is observed, and the quick look from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.norms_compared import times
from benchmarks.norms_compared.run import QUICK, main
from benchmarks.norms_compared.tables import spread
from benchmarks.norms_compared.training import Training, observe, train
from benchmarks.norms_compared.variants import CONFIG, VARIANTS, Variant, build, norms_of
from rmsnorm_deploy.models.builtin import train_addition as recipe
from rmsnorm_deploy.models.builtin.decoder import Decoder, causal_mask, random_decoder, rotary_table
from tests.helpers.extent import slow

IDS = torch.arange(24).reshape(2, 12) % CONFIG.vocab_size
WIDTH = CONFIG.hidden_size
NAMES = [str(variant) for variant in VARIANTS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _by_hand(model: Decoder, variant: Variant) -> Tensor:
    """The logits, from the formula of each variant."""

    def norm(x: Tensor) -> Tensor:
        centered = x - x.mean(-1, keepdim=True) if variant.norm == "LayerNorm" else x
        return centered / (centered.pow(2).mean(-1, keepdim=True) + CONFIG.eps).sqrt()

    x = model.embedding(IDS)
    around = (*rotary_table(IDS.shape[1], CONFIG.head_dim, CONFIG.rope_theta, like=x), causal_mask(IDS.shape[1], x))
    for layer in model.layers:
        parts: tuple[Callable[[Tensor], Tensor], ...] = (lambda h, one=layer: one.attention(h, *around), layer.mlp)
        for part in parts:
            x = norm(x + part(x)) if variant.place == "post-norm" else x + part(norm(x))
    return F.linear(norm(x) if variant.place == "pre-norm" else x, model.lm_head.weight)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_computes_its_formula(variant: Variant) -> None:
    model = build(variant, CONFIG, seed=3)
    kind = nn.LayerNorm if variant.norm == "LayerNorm" else nn.RMSNorm
    count = 2 * CONFIG.num_layers + (variant.place == "pre-norm")
    assert [type(norm) for _, norm in norms_of(model)] == [kind] * count
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), _by_hand(model, variant), rtol=1e-4, atol=1e-5)
        others = [_by_hand(model, other) for other in VARIANTS if other != variant]
        assert all((model(IDS) - other).abs().max() > 1e-3 for other in others)


def test_variants_of_a_seed_have_the_same_matrices() -> None:
    wanted = dict(random_decoder(CONFIG, seed=5, norm_spread=0.0).named_parameters())
    for variant in VARIANTS:
        found = dict(build(variant, CONFIG, seed=5).named_parameters())
        matrices = {name for name, value in found.items() if value.dim() == 2}
        assert matrices == {name for name, value in wanted.items() if value.dim() == 2}
        assert all(torch.equal(found[name], wanted[name]) for name in matrices)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_largest_values_are_those_of_a_known_stream(variant: Variant) -> None:
    """Attention and MLP add nothing, and every token is 3 and -1 in turns, with mean 1 and mean square 5."""
    model = build(variant, CONFIG, seed=0)
    with torch.no_grad():
        model.embedding.weight.copy_(torch.tensor([3.0, -1.0]).repeat(CONFIG.vocab_size, WIDTH // 2))
        for layer in model.layers:
            layer.attention.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    squares = {"square": 9.0, "sum of squares": 5.0 * WIDTH, "mean of squares": 5.0}
    if variant.norm == "LayerNorm":
        squares = {"square": 4.0, "sum of squares": 4.0 * WIDTH, "mean of squares": 4.0, "sum": float(WIDTH)}
    assert observe(model, IDS) == pytest.approx({"residual stream": 3.0, "norm input": 3.0, **squares}, rel=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_stream_behind_a_post_norm_is_not_its_input() -> None:
    """Of a trained scale of 7, the stream is 7 times what is normalized, and the norm's input differs."""
    model = build(Variant("RMSNorm", "post-norm"), CONFIG, seed=0)
    with torch.no_grad():
        for _, norm in norms_of(model):
            norm.weight.fill_(7.0)  # type: ignore[operator, union-attr]
    with_scale, usual = observe(model, IDS), observe(build(Variant("RMSNorm", "post-norm"), CONFIG, seed=0), IDS)
    assert 4 < with_scale["residual stream"] / usual["residual stream"] < 10
    assert with_scale["norm input"] > with_scale["residual stream"]
    before = observe(build(Variant("RMSNorm", "pre-norm"), CONFIG, seed=0), IDS)
    assert before["norm input"] == before["residual stream"]


def test_training_is_that_of_the_checkpoint() -> None:
    """The recipe's decoder has Llama's norm, whose roundings differ from nn.RMSNorm's."""
    rates = [recipe.learning_rate(step, 4) for step in range(4)]
    found = train(build(Variant("RMSNorm", "pre-norm"), CONFIG, seed=1), 1, rates, clip=1.0)
    _, wanted = recipe.train(steps=4, seed=1)
    assert found.losses == pytest.approx(wanted, rel=1e-4)
    assert len(set(found.gradients)) == 4
    assert max(found.gradients) > 1.0  # the norm before clipping


@pytest.mark.parametrize("clip", [0.25, 1e6, None])
def test_a_gradient_is_kept_as_it_was_before_clipping(clip: float | None) -> None:
    model = build(Variant("LayerNorm", "pre-norm"), CONFIG, seed=0)
    (gradient,) = train(model, 0, [1e-3], clip).gradients
    left = nn.utils.get_total_norm([one.grad for one in model.parameters()]).item()  # type: ignore[misc]
    assert gradient > 0.25
    assert left == pytest.approx(0.25 if clip == 0.25 else gradient, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_training() -> None:
    model = build(Variant("RMSNorm", "post-norm"), CONFIG, seed=0)
    found = train(model, 0, [1e30] * 6)
    assert len(found.losses) == len(found.gradients) + 1 < 6
    assert not found.is_finite
    assert not model.training
    assert found.loss_at(1) == found.losses[0]
    assert found.loss_at(len(found.losses)) == found.loss_at(6) == math.inf


def test_a_loss_is_the_mean_of_the_last_ten() -> None:
    training = Training([float(number) for number in range(1, 31)], [])
    assert (training.loss_at(2), training.loss_at(30)) == (1.5, 25.5)


def test_rounds_rotate_and_ratios_are_of_one_round() -> None:
    """Of b, the ratio of the medians is 1, and the median of the ratios 1.5; the first three rounds do not count."""
    clock, order = 0.0, []
    costs = {"a": [2.0, 20.0, 4.0, 8.0, 2.0], "b": [3.0, 20.0, 12.0, 4.0, 3.0], "c": [1.0] * 5}

    def way(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal clock
            clock += ([1000.0, 2000.0, 3000.0] + costs[name])[len(order) // 3]
            order.append(name)

        return call

    found = times.in_turns({name: way(name) for name in costs}, rounds=5, clock=lambda: clock)
    assert found == {"a": (4.0, 1.0), "b": (4.0, 1.5), "c": (1.0, 0.25)}
    assert "".join(order) == "abcbcacab" * 2 + "abcbca"


def test_a_spread_is_the_median_with_its_range() -> None:
    assert spread([3.0, 1.0, 7.0], ".1f") == "3.0 (1.0 to 7.0)"
    assert spread([1.01, 1.02], ".1f") == "1.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'."),
        (["--seeds", "few"], "argument --seeds: expected a whole number of at least 1, got 'few'."),
        (["--high", "-3"], "argument --high: expected a number above 0, got '-3'."),
        (["--clip", "nan"], "argument --clip: expected a number above 0, got 'nan'."),
    ],
)
def test_wrong_numbers_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def _cells(printed: str, title: str) -> dict[str, list[str]]:
    """The table below a title: the cells of each row by its variant or file."""
    part = printed.split(f"## {title}")[1].split("\n\n")[1]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@slow
def test_the_quick_look_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text())
    assert list(found["training"]) == NAMES
    rows = {name: each[0] for name, each in found["training"].items()}
    for name, row in rows.items():
        again = train(build(VARIANTS[NAMES.index(name)], CONFIG, 0), 0, [0.0])
        assert row["losses"][0] == pytest.approx(again.losses[0], rel=1e-4)
        assert row["losses"][0] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.5)
        assert row["accuracy"] < 0.1  # four steps teach nothing
        assert 0 <= row["steps above"] <= QUICK.steps
        assert row["high largest loss"] >= row["high loss"] > row["losses"][0]
        room = float(_cells(printed, "Room in float16")[name][3])
        assert room == pytest.approx(65504 / row["observed"]["sum of squares"], abs=0.5)
        assert (_cells(printed, "Room in float16")[name][5] == "-") == name.startswith("RMSNorm")
    assert len({row["largest gradient"] for row in rows.values()}) == 4

    in_torch = found["norm in PyTorch"]["1 x 1024"]
    assert all(seconds > 0 for ways in in_torch.values() for seconds, _ in ways.values())
    assert [in_torch[way]["nn.LayerNorm"][1] for way in ("forward", "backward")] == [1.0, 1.0]
    in_ort = found["norm in ONNX Runtime"]["1 x 1024"]
    assert {way: row["kernels"] for way, row in in_ort.items()} == {
        "LayerNorm": "1 LayerNormalization",
        "RMSNorm, target ort": "1 SimplifiedLayerNormalization",
        "RMSNorm, target standard": "1 RMSNormalization",
    }
    (steps,) = found["step in ONNX Runtime"].values()
    step = steps["batch 1, tokens 1"]
    assert list(step) == NAMES
    assert all(row["off"] < 1e-4 and row["seconds"] > 0 for row in step.values())
    for name, row in step.items():
        kind = "Simplified" if name.startswith("RMSNorm") else ""
        counts = [item.split() for item in row["kernels"].split(", ")]
        assert sum(int(count) for count, _ in counts) == (5 if name.endswith("pre-norm") else 4)
        assert {op.removeprefix("Skip") for _, op in counts} == {f"{kind}LayerNormalization"}
