"""Independent random streams from one seed."""

import numpy as np


def derived_seed(*keys: int) -> int:
    """A seed for `torch.manual_seed` that differs wherever one of the keys (0 or more) does.

    Arithmetic on a seed would not do: the CPU's generator looks at the lowest 32 bits only.
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])
