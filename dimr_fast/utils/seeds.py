"""Independent random streams from one seed."""

import numpy as np


def derived_seed(*keys: int) -> int:
    """Return a seed for `torch.manual_seed`; different keys (0 or more) give different seeds.

    The keys are hashed: sums such as seed + step would give equal seeds for different keys, and
    torch's CPU generator uses only the lowest 32 bits.
    """
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])
