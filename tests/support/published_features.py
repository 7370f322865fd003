"""Features as the published script writes them."""

from pathlib import Path
from typing import Any

import numpy as np


def write_pair(path: Path, moments: Any, label: Any) -> None:
    """Write moments and label as one object array, as `np.save(path, (moments, label))` did."""
    pair = np.empty(2, dtype=object)
    pair[0], pair[1] = moments, label
    np.save(path, pair)


def published_features(
    folder: Path, labels: list[int], batch: int = 256, dtype: Any = np.float32
) -> np.ndarray[Any, Any]:
    """Write features of random moments [8, 4, 4]; return the moments [N, 2, 8, 4, 4].

    For each batch the files of its images come first, then those of their mirror images.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    moments = generator.normal(size=(len(labels), 2, 8, 4, 4)).astype(dtype)
    number = 0
    for first in range(0, len(labels), batch):
        for view in range(2):
            for image in range(first, min(first + batch, len(labels))):
                label = np.int64(labels[image])
                write_pair(folder / f"{number}.npy", moments[image, view], label)
                number += 1
    return moments
