"""The guide to notebooks runs as a notebook, with the outputs that it describes."""

from typing import Any

import pytest

from tests.docs.pages import ROOT, read_blocks

nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

PAGE = ROOT / "docs" / "guides" / "notebooks.md"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The outputs of each cell, by its last line."""
    codes = [block.body for block in read_blocks(PAGE) if block.is_run]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in codes])
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder))
        patch.setenv("PYTHONWARNINGS", "ignore")  # of the packages that a notebook loads
        nbclient.NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.source.rstrip().splitlines()[-1].split("  #")[0]: cell.outputs for cell in notebook.cells}


@pytest.mark.filterwarnings("ignore")  # of the packages that start a kernel
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("trainer", "text/html", "QuickTrainer: options"),
        ("trainer.explain(train, num_epochs=3, per_device_batch_size=20)", "text/html", "weight (64, 16)"),
        ("history", "text/html", "6 evaluations"),
        ("history.plot()", "image/png", "iVBOR"),
        ("figure", "image/png", "iVBOR"),
    ],
)
def test_a_cell_shows_its_value(outputs: dict[str, list[Any]], line: str, kind: str, text: str) -> None:
    (shown,) = (output for output in outputs[line] if output.output_type == "execute_result")
    assert text in shown.data[kind]
    assert len(shown.data["text/plain"].splitlines()) < 100


@pytest.mark.filterwarnings("ignore")
def test_trainers_with_different_precisions_are_kept_in_a_notebook(outputs: dict[str, list[Any]]) -> None:
    assert outputs["result = trainer.evaluate(validation)"] == []
