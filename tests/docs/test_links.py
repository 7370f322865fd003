"""Every relative link in the Markdown files leads to a file, and its #anchor to a heading there."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.support.paths import ROOT

PAGES = sorted(
    {
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
        *(ROOT / "kernels").glob("*.md"),
        *(ROOT / "csrc").rglob("*.md"),
        ROOT / "dimr_fast" / "pretrained" / "demo" / "README.md",
    }
)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")


def without_code(text: str) -> str:
    """Return the text without code blocks and code spans."""
    text = re.sub(r"^(```+|~~~+).*?^\1\s*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def links(page: Path) -> list[str]:
    """Return the targets of a page's relative links."""
    targets = LINK.findall(without_code(page.read_text(encoding="utf-8")))
    return [unquote(t) for t in targets if not re.match(r"[a-z]+:", t)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the documentation site name them."""
    text = re.sub(r"^```.*?^```\s*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`: c\n[x](a.md#b) [y](https://x.y) `[z](c.md)`\n```sh\n# [q](d.md)\n```\n"
    )
    assert links(page) == ["a.md#b"]
    assert anchors(page) == {"a-b-c"}


def test_the_site_lists_every_page() -> None:
    """`mkdocs build --strict` fails otherwise; this test needs no mkdocs."""
    listed = re.findall(r": ([\w./-]+\.md)$", (ROOT / "docs" / "mkdocs.yml").read_text(), re.M)
    assert {str(page.relative_to(ROOT)) for page in PAGES} == set(listed)
