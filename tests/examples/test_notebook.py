"""examples/block.ipynb runs from its first cell to its last, and shows what it says."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from checkout import ROOT

NOTEBOOK = ROOT / "examples" / "block.ipynb"


def test_it_is_kept_without_results():
    """They would be another machine's, and change with every run."""
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.fixture(scope="module")
def outputs() -> list[list[dict[str, Any]]]:
    """What each cell of code has shown."""
    for name in ("nbclient", "ipykernel", "mlxtend", "matplotlib", "tqdm"):
        pytest.importorskip(name)
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def text_of(shown: list[dict[str, Any]]) -> str:
    return "".join(output.get("text", "") for output in shown)


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(outputs):
    images, training, maps, context, cost = outputs
    assert "1000 images to train on, 250 to test" in text_of(images)
    assert "gcnet_ext block" in text_of(training)
    assert any("image/png" in output.get("data", {}) for output in maps)
    assert any(output["data"]["text/plain"] == "torch.Size([2, 32])" for output in context if "data" in output)
    assert "block 8x64x28x28 train" in text_of(cost)
