"""The reference decoder: what it computes, how it exports, how it is kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from rmsnorm_deploy.models.builtin.checkpoint import CHECKPOINTS, addition, load_decoder, save_decoder
from rmsnorm_deploy.models.builtin.decoder import (
    NORMS,
    DecoderConfig,
    NormKind,
    causal_mask,
    random_decoder,
    rotary_table,
    rotate,
    small_decoder,
)
from rmsnorm_deploy.models.errors import UsageError

KINDS = get_args(NormKind)
FIELDS: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
}


def ids(batch: int, seq: int, vocab: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens)


# ------------------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("kind", KINDS)
def test_every_norm_is_the_formula_in_float64(kind: NormKind) -> None:
    model = small_decoder(kind, seed=3)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    scale = model.norm.weight.detach().double() if kind != "none" else torch.ones(64).double()
    scale = scale + 1 if kind == "gemma" else scale
    reference = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    assert (logits(model.norm, x) - reference).abs().max() < 2e-6


def test_the_cast_order_tells_llama_from_olmo_in_bfloat16() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = (1 + 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(2))).bfloat16()
    outputs = {}
    for kind in ("llama", "olmo"):
        norm = NORMS[kind](64, 1e-6).bfloat16()
        norm.load_state_dict({"weight": weight})
        outputs[kind] = logits(norm, x)
    h = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(outputs["llama"], weight * h.bfloat16())
    assert torch.equal(outputs["olmo"], (weight.float() * h).bfloat16())
    assert 0.05 < (outputs["llama"] != outputs["olmo"]).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_float16_inputs_do_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((1, 32), 1000.0, dtype=dtype)  # 1000² is beyond float16
    for kind in ("llama", "olmo", "gemma", "none"):
        assert torch.equal(logits(NORMS[kind](32, 1e-6).to(dtype), x), torch.ones_like(x)), kind


# ------------------------------------------------------------------------------------------------------ transformer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "tie_embeddings": True, "num_kv_heads": 4}])
def test_a_later_token_changes_no_earlier_logits(kind: NormKind, changes: dict[str, Any]) -> None:
    model = small_decoder(kind, **changes)
    tokens = ids(2, 9)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 64
    before, after = logits(model, tokens), logits(model, changed)
    assert before.shape == (2, 9, 64)
    assert torch.equal(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(dim=(0, 2)) > 1e-3).all()


def test_rows_of_a_batch_and_lengths_do_not_mix() -> None:
    model = small_decoder()
    tokens = ids(3, 8)
    whole = logits(model, tokens)
    assert torch.allclose(logits(model, tokens[1:2]), whole[1:2], atol=1e-5)
    assert torch.allclose(logits(model, tokens[:, :5]), whole[:, :5], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.03), (torch.bfloat16, 0.25)])
def test_narrow_dtypes_stay_near_float32(kind: NormKind, dtype: torch.dtype, bound: float) -> None:
    exact = logits(small_decoder(kind, qk_norm=True), ids(2, 12))
    narrow = logits(small_decoder(kind, qk_norm=True).to(dtype), ids(2, 12))
    assert narrow.dtype == dtype
    assert 0 < (narrow.float() - exact).abs().max() < bound


def test_rotary_embedding_depends_on_distance_only_and_keeps_length() -> None:
    cos, sin = rotary_table(40, 16, 10_000.0, like=torch.empty(0))
    assert cos.shape == sin.shape == (40, 8)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(2, 1, 1, 40, 16)
    rotated_query, rotated_key = rotate(query, cos, sin), rotate(key, cos, sin)
    scores = (rotated_query @ rotated_key.mT)[0, 0]
    assert torch.allclose(scores[5, 2], scores[38, 35], atol=1e-4)
    assert (scores[5, 2] - scores[5, 4]).abs() > 1e-2
    assert torch.allclose(rotated_query.norm(dim=-1), query.norm(dim=-1), atol=1e-5)
    assert torch.equal(rotated_query[:, :, 0], query[:, :, 0])


def test_rotary_table_is_rounded_once_in_narrow_dtypes() -> None:
    exact = rotary_table(500, 16, 10_000.0, like=torch.empty(0))
    narrow = rotary_table(500, 16, 10_000.0, like=torch.empty(0, dtype=torch.bfloat16))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(exact, narrow, strict=True))


def test_causal_mask() -> None:
    mask = causal_mask(3, like=torch.empty(0, dtype=torch.float16))
    inf = float("inf")
    assert mask.dtype == torch.float16
    assert mask.tolist() == [[0, -inf, -inf], [0, 0, -inf], [0, 0, 0]]


def test_one_onnx_file_serves_every_batch_and_length(tmp_path: Path) -> None:
    model = small_decoder("llama", qk_norm=True, num_layers=1)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        model, (ids(2, 5),), dynamo=True, dynamic_shapes=({0: dynamic, 1: dynamic},), opset_version=20, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        for seq in (1, 7, 33):
            tokens = ids(batch, seq, seed=seq)
            (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
            np.testing.assert_allclose(found, logits(model, tokens).numpy(), atol=2e-5)


# -------------------------------------------------------------------------------------------------- built-in models


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_seeded_and_leave_the_global_generator_alone(kind: NormKind) -> None:
    before = torch.get_rng_state()
    one, again, other = small_decoder(kind, seed=5), small_decoder(kind, seed=5), small_decoder(kind, seed=6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_random_norm_weights_are_not_all_ones(kind: NormKind) -> None:
    weights = {name: p for name, p in small_decoder(kind, qk_norm=True).named_parameters() if "norm" in name}
    assert len(weights) == 9  # two layers of four, and the last
    center = 0 if kind == "gemma" else 1
    assert all(0.05 < weight.std() < 0.5 and abs(weight.mean() - center) < 0.2 for weight in weights.values())


def test_shipped_decoder_is_a_trained_llama_below_two_megabytes() -> None:
    model = addition()
    assert (model.config.norm, model.config.task, model.training) == ("llama", "addition", False)
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    assert len(norms) == 2 * model.config.num_layers + 1
    assert all(weight.std() > 0.01 for weight in norms)
    folder = CHECKPOINTS / "addition"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2_000_000


# ----------------------------------------------------------------------------------------------------------- config


def test_config_round_trip() -> None:
    config = DecoderConfig(**FIELDS, norm="gemma", qk_norm=True, tie_embeddings=True, task="t")
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_layers": 1.5}, r"num_layers is 1\.5"),
        ({"num_heads": True}, "num_heads is True"),
        ({"hidden_size": 30}, "heads of an even size; make it a multiple of 8"),
        ({"hidden_size": 36}, "heads of an even size; make it a multiple of 8"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"norm": "layer"}, "norm is 'layer'; it must be one of torch, llama"),
        ({"eps": -1.0}, "eps is -1"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"qk_norm": 1}, "qk_norm is 1"),
        ({"task": 3}, "task is 3"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DecoderConfig(**{**FIELDS, **changes})


def test_config_from_dict_refuses_unknown_and_missing_fields() -> None:
    with pytest.raises(UsageError, match="unknown DecoderConfig fields: bias, depth"):
        DecoderConfig.from_dict({**FIELDS, "depth": 1, "bias": True})
    with pytest.raises(UsageError, match="missing DecoderConfig fields: hidden_size"):
        DecoderConfig.from_dict({name: value for name, value in FIELDS.items() if name != "hidden_size"})
    with pytest.raises(UsageError, match="unknown DecoderConfig fields: depth"):
        small_decoder(depth=1)


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_bit_equal(kind: NormKind, dtype: torch.dtype, tmp_path: Path) -> None:
    model = small_decoder(kind, tie_embeddings=kind == "gemma", qk_norm=True, task="t").to(dtype)
    save_decoder(model, tmp_path / "new" / "folder")
    loaded = load_decoder(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    assert all(p.dtype == dtype and p.requires_grad for p in loaded.parameters())
    assert torch.equal(logits(model, ids(2, 6)), logits(loaded, ids(2, 6)))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_saving_again_replaces_and_saving_does_not_touch_the_model(tmp_path: Path) -> None:
    save_decoder(small_decoder(seed=1), tmp_path)
    model = small_decoder(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_decoder(model, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in load_decoder(tmp_path).state_dict().items())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


def test_failed_save_leaves_the_earlier_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_decoder(small_decoder(seed=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_bytes

    def full_disk(path: Path, content: bytes) -> int:
        if "config" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UsageError, match="No space left on device; choose a folder"):
        save_decoder(small_decoder(seed=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_save_refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UsageError, match=r"cannot write the decoder to .*taken"):
        save_decoder(small_decoder(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_decoder(random_decoder(DecoderConfig(**FIELDS), seed=0), tmp_path)
    return tmp_path


def test_load_refuses_missing_folder_and_files(saved: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is not a folder; give the folder that holds"):
        load_decoder(saved / "nowhere")
    (saved / "model.safetensors").rename(saved / "other")
    with pytest.raises(UsageError, match=r"has no file model\.safetensors"):
        load_decoder(saved)
    (saved / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no file config\.json"):
        load_decoder(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json cannot be read as JSON"),
        ("[]", r"config\.json: expected \"format\" 'rmsnorm_deploy\.decoder', got None"),
        ('{"vocab_size": 1}', r"config\.json: expected \"format\" .*, got None"),
        ('{"format": "llama"}', r"config\.json: expected \"format\" .*, got 'llama'"),
        ('{"format": "rmsnorm_deploy.decoder"}', r"config\.json: missing DecoderConfig fields: vocab_size"),
        (json.dumps({"format": "rmsnorm_deploy.decoder", **FIELDS, "x": 1}), r"config\.json: unknown .* fields: x"),
        (json.dumps({"format": "rmsnorm_deploy.decoder", **FIELDS, "eps": "1"}), r"config\.json: .*eps is '1'"),
    ],
)
def test_load_refuses_a_bad_config(saved: Path, content: str, message: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        load_decoder(saved)


def test_load_refuses_weights_that_do_not_fit(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())  # load_file would map the file that is rewritten below

    def rewrite(changed: dict[str, torch.Tensor]) -> None:
        path.write_bytes(safetensors.torch.save(changed))

    rewrite({name: tensor for name, tensor in tensors.items() if not name.startswith("layers.0.attention.")})
    with pytest.raises(
        UsageError, match=r"missing tensors: .*k_proj.weight, .*o_proj.weight, .*q_proj.weight and 1 more\."
    ):
        load_decoder(saved)
    rewrite({**tensors, "layers.1.extra": torch.ones(2)})
    with pytest.raises(UsageError, match=r"unexpected tensors: layers\.1\.extra"):
        load_decoder(saved)
    rewrite({**tensors, "norm.weight": torch.ones(31)})
    with pytest.raises(UsageError, match=r"misshaped tensors: norm\.weight \[31\] instead of \[32\]"):
        load_decoder(saved)
    rewrite({**tensors, "norm.weight": torch.ones(32, dtype=torch.int32)})
    with pytest.raises(UsageError, match=r"expected one floating dtype, got torch\.float32, torch\.int32"):
        load_decoder(saved)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match=r"model\.safetensors cannot be read as safetensors"):
        load_decoder(saved)
