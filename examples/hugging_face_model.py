"""Export a Hugging Face model and compare the export with PyTorch.

python examples/hugging_face_model.py                    # a small Qwen3 with random weights
python examples/hugging_face_model.py Qwen/Qwen3-0.6B    # any hub name or folder
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import rmsnorm_deploy as rd


def small_qwen3(folder: Path) -> str:
    """Save a small Qwen3 with random weights, so that this example needs no download."""
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    return str(folder / "qwen3")


def main() -> int:
    """Return 0 if the export is as accurate as PyTorch."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        name = sys.argv[1] if len(sys.argv) > 1 else small_qwen3(folder)
        exported = rd.export_model(name, folder / "out", target="ort", with_past=True)
        print(f"{len(exported.recognition.sites)} norms, for example: {exported.recognition.sites[0].spec.describe()}")
        report = rd.validate(exported.folder, name)
        print(report)
    return 0 if report.verdict == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
