"""A quick check of the installed versions: a tiny Qwen3 through export, validate and generate.

`python smoke.py` prints one line per step and exits with 1 if any of them fails. It only uses the installed package,
so it also runs outside of a checkout.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

TARGETS = ("primitives", "standard", "ort", "plugin")
NORMS = 9  # of each of 2 layers: input, post-attention, query and key; and the last
PROMPT = [3, 14, 15, 92, 65]
LIBRARIES = ("torch", "transformers", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy", "ml_dtypes")


def saved_qwen3(folder: Path) -> Path:
    """The folder of a Qwen3 with 2 layers and random weights."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).eval().save_pretrained(folder)
    return folder


def check(model: Path, folder: Path, expected: list[int]) -> str:
    """Validate one export of the model, and compare its tokens with PyTorch's.

    Raises:
        AssertionError: a result differs; the message says which.
    """
    from rmsnorm_deploy import generate, validate

    report = validate(folder, str(model))
    if report.verdict != "pass":
        raise AssertionError(f"validate: expected pass, got {report.verdict}: {report}")
    tokens = [int(token) for token in generate(folder, PROMPT, max_new_tokens=8).ids]
    if tokens != expected:
        raise AssertionError(f"generate: expected {expected}, got {tokens}")
    return f"validate {report.verdict}, {len(tokens)} tokens as PyTorch's"


def export(model: Path, folder: Path, with_past: bool) -> str:
    """Export the model for every target, one subfolder each.

    Raises:
        AssertionError: norms are missing.
    """
    from rmsnorm_deploy import export_model
    from rmsnorm_deploy.models.versions import older

    # Earlier versions compute the operator of attention otherwise, and refuse the file.
    attention = "decomposed" if older(importlib.metadata.version("onnxruntime"), "1.27") else "node"
    results = export_model(str(model), folder, target=list(TARGETS), with_past=with_past, attention=attention)
    counts = [len(result.manifest["sites"]) for result in results]
    if counts != [NORMS] * len(TARGETS):
        raise AssertionError(f"expected {NORMS} norms in each of {len(TARGETS)} files, got {counts}")
    return f"{len(results)} files of {NORMS} norms"


def pytorch_tokens(model: Path) -> list[int]:
    """The tokens that PyTorch generates for the prompt."""
    import torch
    from transformers import Qwen3ForCausalLM

    loaded = Qwen3ForCausalLM.from_pretrained(model)
    with torch.no_grad():
        ids = loaded.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    return [int(token) for token in ids[0, len(PROMPT) :]]


def main() -> int:
    """Run every step; the exit code is 1 if any of them failed."""
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES), flush=True)
    passed = []
    with tempfile.TemporaryDirectory() as name:
        model = saved_qwen3(Path(name) / "model")
        expected = pytorch_tokens(model)
        for with_past in (False, True):
            folder = Path(name) / ("cache" if with_past else "plain")
            title = " with cache" if with_past else ""
            passed.append(_passes(f"export{title}", functools.partial(export, model, folder, with_past)))
            for target in TARGETS if passed[-1] else ():
                step = functools.partial(check, model, folder / target, expected)
                passed.append(_passes(f"{target}{title}", step))
    return 0 if all(passed) else 1


def _passes(form: str, step: Callable[[], str]) -> bool:
    start = time.perf_counter()
    try:
        outcome = step()
    except Exception as error:  # every step is tried, whatever fails in one
        print(f"FAIL {form}: {type(error).__name__}: {error}", flush=True)
        traceback.print_exc()
        return False
    print(f"ok   {form}: {outcome} ({time.perf_counter() - start:.0f} s)", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
