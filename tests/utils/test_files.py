"""Files that are written atomically, and locks of output folders."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dimr_fast.errors import Interrupted
from dimr_fast.utils.files import lock_folder, remove_unfinished, write_atomically

fcntl = pytest.importorskip("fcntl", reason="the system has no fcntl")


def test_a_folder_is_locked_against_another_process_until_the_block_ends(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from dimr_fast.utils.files import lock_folder\n"
    code += "with lock_folder(Path(sys.argv[1]), timeout=0.2): pass"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with lock_folder(tmp_path):
        refused = subprocess.run(command, capture_output=True, text=True)
        assert "another process is writing there" in refused.stderr
    subprocess.run(command, check=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with lock_folder(tmp_path, timeout=0.2):
        (tmp_path / "result").write_text("written")


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"), lock_folder(tmp_path / "file", timeout=0.2):
        pass


def test_an_error_is_passed_on_where_the_unfinished_file_cannot_be_removed(tmp_path: Path) -> None:
    """As in a folder that has become read-only."""
    folder = tmp_path / "out"
    folder.mkdir()

    def write(part: Path) -> None:
        shutil.rmtree(folder)
        folder.write_text("a file instead of the folder")
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        write_atomically(folder / "file", write)


KILLED = """
import os, signal, sys
from pathlib import Path
from dimr_fast.utils.files import write_atomically

def write(path):
    path.with_name(".tmpAbc123").touch()
    os.kill(os.getpid(), signal.SIGKILL)

for name in sys.argv[2:]:
    if os.fork() == 0:
        write_atomically(Path(sys.argv[1], name), write)
    os.wait()
"""


def test_what_killed_processes_leave_is_removed(tmp_path: Path) -> None:
    """Also files that a library adds beside the one it writes, as safetensors does."""
    names = ["a.safetensors", "b.safetensors"]
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), *names], check=True)
    assert len(list(tmp_path.rglob(".tmpAbc123"))) == 2
    remove_unfinished(tmp_path, "a.safetensors")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".b.safetensors.")
    remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())
