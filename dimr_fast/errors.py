"""The exceptions of dimr_fast.

Bad arguments raise ValueError or TypeError; a file that cannot be written raises OSError.
"""


class CheckpointError(RuntimeError):
    """Report a checkpoint that is missing, damaged or of another kind. The message names it."""


class Interrupted(KeyboardInterrupt):
    """Report a job that a signal has ended; `signal` is its number."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"ended by signal {signal}")
        self.signal = signal


class DataUnavailableError(RuntimeError):
    """Report an optional package that is missing or incomplete, and the extra that installs it."""

    def __init__(self, missing: str, extra: str = "demo") -> None:
        super().__init__(f'{missing} not found; install it with: pip install "dimr_fast[{extra}]"')


class DamagedShardError(OSError):
    """Report a latent shard that is missing, truncated or altered. The message names the file."""


class UnreadableImageError(OSError):
    """Report an image file that cannot be decoded; `reason` says why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
