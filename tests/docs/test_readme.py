"""The README and docs/: commands, snippets, and the files and names that pages mention."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dimr_fast import DiMR
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("dimr_fast", "kernels", "csrc", "benchmarks", "tests", "docs")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 165


@pytest.mark.parametrize("name", ["demo command", "test command"])
def test_a_command_creates_its_environment(name: str) -> None:
    (command,) = re.findall(rf"<!-- {name} -->\n```sh\n(.*)\n```\n", README)
    assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install torch")


# The code of exporting.md needs packages of its own: tests/model/test_exporting.py runs it.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "exporting.md"], ids=lambda page: page.name
)
def test_python_snippets_parse_and_import_what_exists(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")
        imports = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
        exec("\n".join(imports), {})


def test_the_checkpointing_snippet_configures_one_branch() -> None:
    page = (ROOT / "docs" / "model.md").read_text()
    (block,) = re.findall(r"```python\n(from dataclasses.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"DiMR": DiMR}
    with torch.device("meta"):
        exec(block, names)
    assert [b.checkpointing for b in names["model"].config.stage_configs] == [True, False]


def find(name: str) -> Path | None:
    """Return the file or folder that a page names: from the root, from dimr_fast/, or anywhere."""
    for folder in (ROOT, ROOT / "dimr_fast"):
        if (folder / name).exists():
            return folder / name
    if "/" in name:
        return None
    return next((path for folder in FOLDERS for path in (ROOT / folder).rglob(name)), None)


FILE = re.compile(r"[\w./-]+(?:\.(?:py|md|h|cpp|cu|cuh|txt|yaml)|/)")


@pytest.mark.parametrize(
    "name", ["README.md", "docs/design.md", "docs/kernels.md", "docs/model.md"]
)
def test_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    map_of_folders = re.findall(r"```text\n(dimr_fast/.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"[\w./]+", "".join(map_of_folders))
    found = [span for span in spans if FILE.fullmatch(span)]
    assert len(found) >= 2
    for span in found:
        assert find(span) is not None, span


def test_names_in_the_table_of_where_things_happen_are_in_their_files() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    table = page.split("## Where things happen")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        spans = re.findall(r"`([^`]+)`", row.split("|")[2])
        files = [path for span in spans if (path := find(span)) is not None and path.is_file()]
        text = "".join(path.read_text() for path in files)
        for span in spans:
            if re.fullmatch(r"[A-Za-z_.]+", span) and not FILE.fullmatch(span):
                assert re.search(rf"(?:def|class) {span.split('.')[-1]}\b", text), (span, row)
