"""Folders of the repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Root of the repository."""
FILES = ROOT / "tests" / "files"
"""Data files of the tests: numbers of the published model, files that earlier versions wrote."""
