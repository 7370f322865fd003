"""Names of the 1000 classes of ImageNet (ILSVRC 2012)."""

from collections.abc import Sequence
from functools import cache
from importlib import resources

COUNT = 1000


@cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Return the WordNet synset, such as n01443537, and the name of each class, by label."""
    text = (resources.files("dimr_fast.data") / "imagenet_classes.txt").read_text(encoding="utf-8")
    pairs = [line.split(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return tuple((synset, name) for synset, name in pairs)


def default_classes(count: int) -> tuple[str, ...]:
    """Return names for classes that are known by number only: ImageNet's for 1000, else numbers."""
    if count == COUNT:
        return tuple(name for _, name in imagenet_classes())
    return tuple(str(number) for number in range(count))


def imagenet_labels(classes: Sequence[str]) -> dict[str, int]:
    """Return the labels of ImageNet's names for a model whose `classes` are called otherwise.

    The classes must be those of ImageNet, named by numbers or by synsets; for others the result is
    empty.
    """
    if len(classes) != COUNT:
        return {}
    synsets = [synset for synset, _ in imagenet_classes()]
    if list(classes) not in (synsets, [str(number) for number in range(COUNT)]):
        return {}
    return {name: label for label, (_, name) in enumerate(imagenet_classes())}
