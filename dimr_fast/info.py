"""Report versions, compiled libraries and the implementation that each operator would use.

`dimr-fast info` or `python -m dimr_fast.info`.
"""

import platform
from collections.abc import Mapping
from importlib import metadata

import torch

from dimr_fast import _extension
from dimr_fast.inference.optimize import InferenceDiMR
from dimr_fast.ops.implementations import OPERATORS, Implementations

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def report(operators: Mapping[str, Implementations] = OPERATORS) -> str:
    """Return the report as plain text, with the implementations of these operators."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    titles = {
        "versions": _versions(),
        "compiled libraries": _libraries(),
        f"operators on {device}, for a first input of": _operators(operators, device),
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in titles.items())


def describe_network(
    network: InferenceDiMR, operators: Mapping[str, Implementations] = OPERATORS
) -> str:
    """Describe in a line which implementations compute the predictions of an optimised model.

    `operators` are those that it may run.
    """
    if network.uses_cpu_library:
        return f"compiled CPU library, {_extension.instruction_set()}"
    if network.implementation != "auto":
        return network.implementation
    chosen: dict[str, list[str]] = {}
    for name, implementations in sorted(operators.items()):
        x = torch.empty(implementations.example, dtype=network.dtype, device=network.device)
        chosen.setdefault(implementations.select("auto", x), []).append(name)
    return "; ".join(f"{name}: {', '.join(of)}" for name, of in chosen.items())


def _versions() -> list[tuple[str, str]]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [
        ("dimr_fast", _version("dimr_fast")),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("GPU", ", ".join(gpus) or "none"),
        *((name, _version(name)) for name in ("triton", "flash-attn", "xformers")),
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _libraries() -> list[tuple[str, str]]:
    facts = _extension.build_facts()
    built = f"{facts['compiler']}, against torch {facts['torch']}" if facts else "nothing compiled"
    rows = [("built with", built)]
    for library in _extension.LIBRARIES:
        loaded = "loaded"
        if library == "cuda" and facts:
            loaded += f", nvcc {facts['cuda']}, for {facts['cuda_architectures']}"
        reason = _extension.why_not(library)
        if library == "cpu" and reason is None:
            loaded += f", uses {_extension.instruction_set()}"
        rows.append((library, loaded if reason is None else f"no: {reason}"))
    return rows


def _operators(operators: Mapping[str, Implementations], device: str) -> list[tuple[str, str]]:
    rows = []
    for name, implementations in sorted(operators.items()):
        by_answer: dict[tuple[str, ...], list[str]] = {}
        for dtype in _DTYPES:
            x = torch.empty(implementations.example, dtype=dtype, device=device)
            answer = _explain(implementations, x)
            by_answer.setdefault(answer, []).append(str(dtype).removeprefix("torch."))
        for (chosen, *others), dtypes in by_answer.items():
            title = f"{name} {list(implementations.example)}"
            rows.append((title, f"{chosen} ({', '.join(dtypes)})"))
            rows.extend(("", f"  {other}") for other in others)
    return rows


def _explain(implementations: Implementations, x: torch.Tensor) -> tuple[str, ...]:
    chosen = implementations.select("auto", x)
    others = [name for name in implementations.names if name != chosen]
    reasons = [(name, implementations.why_not_auto(name, x)) for name in others]
    return chosen, *(f"not {name}: {reason or f'{chosen} comes first'}" for name, reason in reasons)


def _table(rows: list[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"  {left:<{width}}  {right}" for left, right in rows)


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
