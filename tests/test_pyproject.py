"""What pyproject.toml promises is what continuous integration tries."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_lower_bounds_are_the_versions_that_are_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    bounds = {
        requirement.name: Version(specifier.version)
        for requirement in map(Requirement, needed)
        for specifier in requirement.specifier
        if specifier.operator == ">="
    }
    lines = (ROOT / ".github" / "oldest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (oldest,) = (
        run
        for run in yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["strategy"][
            "matrix"
        ]["include"]
        if run["versions"] == "oldest"
    )
    assert oldest["constraints"] == ".github/oldest.txt"
    tried = {
        requirement.name: Version(next(iter(requirement.specifier)).version)
        for requirement in [*pinned, Requirement(oldest["torch"])]
        if requirement.name != "pyarrow"
    }
    assert tried == bounds
    assert project["requires-python"] == f">={oldest['python']}"
