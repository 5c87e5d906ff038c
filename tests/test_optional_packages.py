"""With the required packages alone, ptacc imports and trains; what needs another package says how to install it."""

import json
import re
import sys
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import optional_script
from tests.ranks import find_free_port, launch

ROOT = Path(__file__).parent.parent


def find_required() -> dict[str, Distribution]:
    """Return the packages that ptacc requires, and those that these require, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unread, found = [Requirement(text) for text in project["dependencies"]], dict[str, Distribution]()
    while unread:
        requirement = unread.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            unread += [Requirement(text) for text in found[name].requires or []]
    return found


def link_packages(folder: Path) -> None:
    """Make a folder of links to the required packages, from which Python can import them and no others."""
    for package in find_required().values():
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            (folder / top).symlink_to(str(package.locate_file(top)))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each use of `optional_script` writes, with the required packages alone."""
    folder = tmp_path_factory.mktemp("packages")
    link_packages(folder)
    # -S: without the packages of this environment.
    script = (sys.executable, "-S", "-W", "error", str(optional_script.__file__), str(find_free_port()))
    process = launch(script, env={"PYTHONPATH": f"{ROOT / 'src'}:{folder}"}, timeout=100)
    assert process.returncode == 0, process.stderr
    written: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    return written


@pytest.mark.timeout(120)
@pytest.mark.parametrize("use", ["train", "explain", "yaml"])
def test_the_required_packages_suffice(outcomes: dict[str, str], use: str) -> None:
    assert outcomes[use].startswith("works: ")


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("use", "advice"),
    [
        ("history.plot", "history.plot() needs matplotlib: pip install 'ptacc[plot]'"),
        ("history.to_dataframe", "history.to_dataframe() needs pandas: pip install 'pandas'"),
        ("search.plot", "search.plot() needs matplotlib: pip install 'ptacc[plot]'"),
        ("parse_options", "parse_options() needs tyro: pip install 'ptacc[cli]'"),
        ("wandb", "pip install wandb"),
        ("deepspeed", "pip install 'ptacc[deepspeed]'"),
        ("s3", "Install s3fs"),
    ],
)
def test_what_needs_another_package_says_how_to_install_it(outcomes: dict[str, str], use: str, advice: str) -> None:
    assert advice in outcomes[use]
