"""Tests of the generated pages: they are current, and hide no row in which we are slower."""

import re

import pytest

from benchmarks.report import docs, model
from benchmarks.report.results import ModelResults
from benchmarks.utils.files import BENCHMARKS, RESULTS
from benchmarks.utils.markdown import replace_block, table
from benchmarks.utils.names import OURS


@pytest.mark.parametrize("path", docs.PAGES, ids=lambda path: path.name)
def test_generated_pages_are_current(path: docs.Path) -> None:
    page = path.read_text()
    assert docs.PAGES[path](page) == page, "run python -m benchmarks.report"


def test_the_readme_shows_the_row_in_which_we_are_slowest() -> None:
    results = ModelResults.read(RESULTS / "model_cpu.json")
    ratios = {
        group: found[provider].seconds.median / found[OURS].seconds.median
        for group, found in results.groups().items()
        for provider in model.README_PROVIDERS
        if OURS in found and provider in found
    }
    assert min(ratios, key=lambda group: ratios[group]) in model.README_GROUPS
    assert len(model.readme_table(results, "An image costs nothing.").splitlines()) == 2 + 2 + 6


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.md")), ids=lambda path: path.name)
def test_files_that_a_page_links_to_exist(path: docs.Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).is_file(), target


def test_modules_that_the_pages_name_exist() -> None:
    for path in [*BENCHMARKS.rglob("*.md"), docs.ROOT / "README.md"]:
        for name in re.findall(r"-m (benchmarks(?:\.\w+)+)", path.read_text()):
            module = docs.ROOT / name.replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), name


def test_a_table_has_every_column_of_any_row() -> None:
    assert table([]) == ""
    rows = [{"a": 1.23456, "b": None}, {"c": "x|y", "a": 12345.6}]
    assert table(rows).splitlines() == [
        "| a | b | c |",
        "|---|---|---|",
        "| 1.235 | – |  |",
        "| 12346 |  | x\\|y |",
    ]


def test_a_block_is_replaced_and_nothing_else() -> None:
    page = "before\n<!-- x -->\nold\n<!-- end -->\nafter"
    assert replace_block(page, "x", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="no block 'y'"):
        replace_block(page, "y", "new")
