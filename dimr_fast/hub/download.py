"""Download single files from the Hugging Face Hub: `OWNER/REPOSITORY:FILE`."""

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from dimr_fast.errors import CheckpointError

HUB_FILE = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+):(?P<file>[\w.-]+(?:/[\w.-]+)*)")


def is_hub_file(name: str | Path) -> bool:
    """Return whether `name` is OWNER/REPOSITORY:FILE, and no local file."""
    return HUB_FILE.fullmatch(str(name)) is not None and not Path(name).exists()


def local_file(name: str | Path) -> Path:
    """Return the path of `name`; a file on the Hub is first downloaded to huggingface_hub's cache.

    A file that is in the cache already is used without a network. Raises CheckpointError where the
    Hub does not give it.
    """
    found = HUB_FILE.fullmatch(str(name))
    if found is None or not is_hub_file(name):
        return Path(name)
    try:
        return Path(huggingface_hub.hf_hub_download(found["repository"], found["file"]))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: not downloaded, since the Hugging Face Hub cannot be reached; download the "
            "file where there is a network, and give its path"
        ) from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"{name}: the Hugging Face Hub has no such file, or gives it only after `hf auth login`"
        ) from error
    except Exception as error:  # huggingface_hub passes on those of its HTTP library
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{name}: not downloaded from the Hugging Face Hub ({reason})"
        ) from error
