"""The README's links, modules and snippets exist and work."""

import re
from pathlib import Path
from typing import Any

import torch

from dimr_fast import DiMR

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_what_the_readme_points_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).is_file(), target
    house = README.split("## The house")[1].split("```")[1]
    modules = re.findall(r"\b(\w+)\.py\b", house)
    assert len(modules) > 10
    for name in modules:
        if name not in ("bench_", "test_"):
            found = [*ROOT.glob(f"dimr_fast/**/{name}.py"), *ROOT.glob(f"benchmarks/**/{name}.py")]
            assert found, name


def test_python_snippets_parse_and_import_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if line.startswith(("from ", "import "))]
        exec("\n".join(imports), {})


def test_checkpointing_snippet_does_what_it_says() -> None:
    (block,) = re.findall(r"```python\n(from dataclasses.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {"DiMR": DiMR}
    with torch.device("meta"):
        exec(block, names)
    assert [b.checkpointing for b in names["model"].config.stage_configs] == [True, False]
