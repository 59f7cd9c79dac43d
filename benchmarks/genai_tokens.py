"""Whether onnxruntime-genai gives our tokens, for packages of small decoders of many architectures.

    python -m benchmarks.genai_tokens [--only NAME ...] [--attention in-place]

Each decoder of the zoo has random weights and is exported with a cache, packaged, and run by onnxruntime-genai: a batch
of prompts of one length, and one of several lengths where the model has no sliding window. The exit code is 1 if tokens
differ. Decoders that onnxruntime-genai cannot run are shown with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from rmsnorm_deploy import export_model, package_model
from rmsnorm_deploy.models.errors import RmsnormDeployError
from rmsnorm_deploy.runtime.generation.api import generate_batch
from rmsnorm_deploy.runtime.packaging.genai import genai_notes
from tests.helpers.runtime.genai import genai_tokens

from .zoo.catalog import ENTRIES

EQUAL = [[5, 17, 40], [9, 12, 33], [44, 3, 50]]
SEVERAL = [[5, 17, 40, 8, 33, 51], [9, 12], [44, 3, 50, 21]]
NEW, END = 16, 2
NAMES = [name for name, entry in ENTRIES.items() if entry.kind == "decoder" and not entry.requires]


def judged(name: str, attention: Any, folder: Path) -> tuple[str, bool]:
    """The result of one decoder in words, and whether it is as it must be."""
    model: Any = ENTRIES[name].make()
    model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id = END
    try:
        model.save_pretrained(folder / "checkpoint")
        export_model(folder / "checkpoint", folder / "out", target="ort", with_past=True, attention=attention)
        package_model(folder / "out", "genai", folder / "package")
    except RmsnormDeployError as error:
        return f"not packaged: {str(error).replace(str(folder), '')[:160]}", True
    batches = [EQUAL] if genai_notes(folder / "out") else [EQUAL, SEVERAL]
    for prompts in batches:
        wanted = [one.ids for one in generate_batch(folder / "out", prompts, max_new_tokens=NEW)]
        got = genai_tokens(folder / "package", prompts, NEW)
        if got != wanted:
            return f"tokens differ: expected {wanted}, got {got}", False
    return f"our tokens ({'one length' if len(batches) == 1 else 'several lengths'})", True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.genai_tokens", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help="decoders of the zoo")
    parser.add_argument("--attention", default="in-place", help="how attention is written: node or in-place")
    arguments = parser.parse_args()
    right = True
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            try:
                text, good = judged(name, arguments.attention, Path(folder))
            except Exception as error:
                text, good = f"failed: {type(error).__name__}: {str(error)[:200]}", False
        right = right and good
        print(f"{name}: {text}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
