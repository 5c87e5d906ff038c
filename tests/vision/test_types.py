"""The examples, as a user's pyright sees them: with the types of timm and torchvision."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.examples.qualities import ROOT
from tests.ranks import launch
from tests.vision.environment import FOLDER


@pytest.mark.timeout(120)
def test_pyright_accepts_the_examples_with_the_types_of_timm_and_torchvision(tmp_path: Path) -> None:
    examples = ROOT / "examples" / "vision"
    shutil.copytree(examples, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    config = {"extraPaths": [str(FOLDER), str(ROOT / "src")]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "pyright"), "--outputjson", "--project", str(tmp_path)]
    variables = {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    process = launch([*command, "--pythonpath", sys.executable], env=variables, timeout=110)
    report = json.loads(process.stdout)
    errors = [f"{Path(found['file']).name}: {found['message']}" for found in report["generalDiagnostics"]]
    assert errors == []
    assert report["summary"]["filesAnalyzed"] == len([*examples.glob("*.py")])
