"""Every page of docs/ does what it says: its blocks are run in order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.interface.command_line import CommandLine
from tests.helpers.interface.guides import Reader, blocks_of, check_command, continues, is_shown, steps_of

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
GUIDES = [name for name in PAGES if name.startswith("guides/")]
EXAMPLE = """---
continues: export.md serve.md
---

# A page

```console
$ rmsnorm \\
>     --version
rmsnorm-deploy ...
$ rmsnorm export nosuch:model -o out
error: ...
$ echo $?
2
```

```python title="made.py"
x = 1
```

```python
import made

print(made.x)
```

```text
1
```

```sh
rmsnorm export Qwen/Qwen3-0.6B -o out --target ort  # a download
```
"""


@pytest.fixture
def rmsnorm(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)


def _text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def _groups() -> list[list[str]]:
    """The pages in the order in which they are run; those that continue each other together, so that each runs once."""
    groups: list[list[str]] = []
    for name in sorted(PAGES, key=lambda name: len(continues(_text(name)))):
        before = {f"guides/{other}" for other in continues(_text(name))}
        joined = [group for group in groups if before & set(group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(page for group in joined for page in group), name])
    return groups


@pytest.mark.parametrize("names", _groups(), ids="+".join)
def test_pages_do_what_they_say(
    names: list[str], rmsnorm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        folder = tmp_path / Path(name).stem
        folder.mkdir()
        for other in continues(_text(name)):
            shutil.copytree(tmp_path / Path(other).stem, folder, dirs_exist_ok=True)
        with monkeypatch.context() as here, Reader(rmsnorm) as reader:
            here.chdir(folder)
            here.syspath_prepend(folder)
            reader.read(_text(name))


def test_pages_that_continue_others_run_behind_them() -> None:
    groups = _groups()
    assert sorted(name for group in groups for name in group) == PAGES
    (group,) = [group for group in groups if "guides/serve.md" in group]
    assert group.index("guides/serve.md") > max(group.index("guides/export.md"), group.index("guides/decoder.md"))


def test_every_guide_has_commands_and_what_they_print() -> None:
    assert len(GUIDES) >= 7
    for name in GUIDES:
        blocks = blocks_of(_text(name))
        steps = [step for block in blocks if block.language == "console" for step in steps_of(block.text)]
        assert len(steps) >= 3, name
        assert any(step.shown not in ([], ["..."]) for step in steps), name


def test_the_reader_runs_and_compares(rmsnorm: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert continues(EXAMPLE) == ["export.md", "serve.md"]
    with Reader(rmsnorm) as reader:
        reader.read(EXAMPLE)
        for before, after, message in (
            ("rmsnorm-deploy ...", "another ...", "the page shows"),
            ("$ echo $?\n2\n", "", "ended with 2"),
            ("$ echo $?\n2\n", "$ echo $?\n3\n", "the page shows"),
            ("```text\n1", "```text\n2", "the page shows"),
            ("```sh", "```bash", "got {'bash'}"),
            ("```sh", "  ```sh", "a fence is indented"),
        ):
            assert before in EXAMPLE
            with pytest.raises(AssertionError, match=message):
                reader.read(EXAMPLE.replace(before, after))


@pytest.mark.parametrize(
    ("shown", "is_it"),
    [("a\nb\nc", True), ("a\n...\nc", True), ("...\nc", True), ("a\nb", False), ("a\nb\nc\n...", True),
     ("a\n...\nb", False), ("a\n... b\nc", False), ("...a\nb...\n...", True)],
)  # fmt: skip
def test_dots_stand_for_what_varies(shown: str, is_it: bool) -> None:
    assert is_shown(shown.splitlines(), "a\nb  \nc\n") is is_it


def test_a_command_that_is_not_run_must_be_one() -> None:
    check_command("pip install torch")
    check_command("rmsnorm build out -o model.engine --arch sm_86,sm_89")
    with pytest.raises(Exception, match="No such option: --arhc"):
        check_command("rmsnorm build out -o model.engine --arhc sm_86")
    with pytest.raises(KeyError):
        check_command("rmsnorm biuld out")
