"""The site is built without a warning, and loads nothing from other hosts. Needs the extra `docs`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rmsnorm_deploy
from docs.generate import pages

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
# What a browser loads: attributes of elements, and rules of style sheets.
LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?((?:https?:)?//[^"\s>]+)'
    r'|<link\b(?=[^>]*\brel="?(?:stylesheet|icon|preload|preconnect))[^>]*\bhref="?((?:https?:)?//[^"\s>]+)'
    r"|(?:@import\s+|url\()[\"']?((?:https?:)?//[^\"'\s)]+)"
)

pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} missing; install them with: pip install -e '.[docs]'"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("documentation") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    written = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    made = {str(Path(path).with_suffix(".html")) for path in pages()}
    found = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert found - {"404.html"} == written | made
    assert not list(site.rglob("*.py"))


def test_every_public_name_has_its_docstring(site: Path) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (site / "python").glob("*.html"))
    for name in rmsnorm_deploy.__all__:
        assert f'id="rmsnorm_deploy.{rmsnorm_deploy._HOME[name]}.{name}"' in text
    for words in ("Find the norms of", "The message says what is wrong, where, and what to do."):
        assert words in text


def test_nothing_is_loaded_from_other_hosts(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(files) >= 30
    found = {match[0][:120] for path in files for match in LOADED.finditer(path.read_text(encoding="utf-8"))}
    assert found == set()


@pytest.mark.parametrize(
    "text",
    ['<script async src="https://example.com/a.js">', '<link rel="stylesheet" href="//example.com/a.css">',
     "@import 'https://example.com/a.css'", "background: url(https://example.com/a.png)"],
)  # fmt: skip
def test_what_is_loaded_is_found(text: str) -> None:
    assert LOADED.search(text)
