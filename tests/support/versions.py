"""Other versions of installed packages, as a test invents them."""

from dimr_fast.ops import packages


def forget_versions() -> None:
    """Let the package read again which versions are installed, as it does once in a process."""
    packages.version.cache_clear()
    packages.why_not.cache_clear()
