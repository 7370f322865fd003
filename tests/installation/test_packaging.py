"""What describes the package to others: extras, citation, workflow of the wheels, issue forms."""

import re
import tomllib
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WHEELS = ROOT / ".github" / "workflows" / "wheels.yml"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Any) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_extra_all_contains_every_extra_of_users() -> None:
    extras = PROJECT["optional-dependencies"]
    (listed,) = [re.fullmatch(r"dimr_fast\[(.*)\]", entry) for entry in extras["all"]]
    assert listed is not None
    assert set(listed[1].split(",")) == set(extras) - {"all", "test", "docs", "dev"}


def test_the_citation_names_the_version_and_the_paper_of_the_readme() -> None:
    citation, readme = load(ROOT / "CITATION.cff"), (ROOT / "README.md").read_text()
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    paper = citation["preferred-citation"]
    assert f"title = {{{paper['title']}}}" in readme
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert f"author = {{{' and '.join(names)}}}" in readme
    assert f"year = {{{paper['year']}}}" in readme
    assert paper["url"] in readme


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == PROJECT["version"]


def test_the_workflow_builds_the_wheels_that_pyproject_lists() -> None:
    job = load(WHEELS)["jobs"]["wheel"]
    platforms = {
        entry["platform"]: entry["runner"] for entry in job["strategy"]["matrix"]["include"]
    }
    assert [f"cp311-{p}" for p in platforms] == PYPROJECT["tool"]["cibuildwheel"]["build"]
    # Each on a machine of its own architecture, not in an emulation.
    for platform, runner in platforms.items():
        assert runner.startswith("macos" if "macosx" in platform else "ubuntu")
        assert runner.endswith("-arm") == ("aarch64" in platform)
    (builder,) = [step for step in job["steps"] if "cibuildwheel" in step.get("uses", "")]
    assert builder["env"]["CIBW_BUILD"] == "cp311-${{ matrix.platform }}"


def test_the_workflow_checks_and_keeps_what_it_builds() -> None:
    workflow = load(WHEELS)
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for step in workflow["jobs"]["sdist"]["steps"] if "run" in step]
    assert any("twine check --strict" in command for command in commands)
    for job in workflow["jobs"].values():
        assert job["steps"][-1]["with"]["if-no-files-found"] == "error"


def test_cibuildwheel_uses_the_wheel_that_it_built() -> None:
    settings = PYPROJECT["tool"]["cibuildwheel"]
    path = settings["test-command"].removeprefix("python {project}/")
    assert (ROOT / path).is_file()
    required = {re.split(r"[>=]", r)[0] for r in PYPROJECT["build-system"]["requires"]}
    assert all(name in settings["before-build"] for name in required)
    oldest = next(entry for entry in PROJECT["dependencies"] if entry.startswith("torch"))
    assert f"'{oldest}'" in settings["before-build"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_forms(path: Any) -> None:
    form = load(path)
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)
