"""Make docs/images/summary.png: the page of a recipe that was shipped twice. It needs chromium and Pillow.

python docs/screenshot.py
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from rmsnorm_deploy import export_model, ship

IMAGE = Path(__file__).parent / "images" / "summary.png"
WIDTH, HEIGHT = 1330, 1290
SIZE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 128,
}  # fmt: skip
RECIPE = """
[[model]]
name = "llama"
source = "./llama"
targets = ["ort"]
dtypes = ["float32", "float16"]
with_past = true
package = ["triton"]

[[model]]
name = "qwen3-int4"
source = "./qwen3"
targets = ["ort"]
with_past = true
quantize = "int4"
package = ["ort-server"]

[[model]]
name = "from-a-file"
source = "given/model.onnx"
against = "./llama"
targets = ["standard"]
build = ["rtx"]
architectures = ["sm_89"]
runners = ["ort"]
"""


def main() -> None:
    """Ship, change an option, ship again, and draw the page."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("expected chromium or google-chrome, found neither.")
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        folder = Path(place)
        for name, config in (("llama", LlamaConfig(**SIZE)), ("qwen3", Qwen3Config(head_dim=16, **SIZE))):
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        export_model(str(folder / "llama"), folder / "given")
        for recipe in (RECIPE, RECIPE.replace("with_past = true", "with_past = true\nprovider = 'CPU'", 1)):
            Path("rmsnorm.toml").write_text(recipe)
            ship("rmsnorm.toml")
        page, shot = folder / "dist" / "summary.html", folder / "shot.png"
        options = ("--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}")
        subprocess.run([browser, *options, f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True)
        IMAGE.parent.mkdir(exist_ok=True)
        Image.open(shot).convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(IMAGE, optimize=True)


if __name__ == "__main__":
    main()
