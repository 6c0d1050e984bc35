"""The notebook runs from top to bottom, again, and on after the stop button."""

import os
import re
import shutil
import signal
import threading

import nbformat
import pytest
from conftest import REPOSITORY
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

pytestmark = pytest.mark.slow
NOTEBOOK = REPOSITORY / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.fixture
def client(tmp_path):
    """The notebook with few images, and a kernel whose folder is a new one."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        small = re.sub(r":[12]000\]", ":192]", cell.source).replace("../../recipes", str(REPOSITORY / "recipes"))
        cell.source = small.replace('"epochs": 3', '"epochs": 2')
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        yield client


def the_cell(client, words):
    return next((cell, index) for index, cell in enumerate(client.nb.cells) if words in cell.source)


def tables(cell):
    return [output["data"]["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]


def test_runs_and_runs_again(client, tmp_path):
    for index, cell in enumerate(client.nb.cells):
        client.execute_cell(cell, index)
    plan, _ = the_cell(client, "distiller.plan")
    fit, index = the_cell(client, "distiller.fit")
    assert "added parameters" in tables(plan)[0]
    history = tables(fit)[-1]
    assert history.count("<tr>") == 3
    client.execute_cell(fit, index)
    assert tables(fit)[-1] == history
    shutil.rmtree(tmp_path / "runs")
    client.execute_cell(fit, index)  # anew
    assert tables(fit)[-1].count("<tr>") == 3


def test_stop_button(client):
    fit, at = the_cell(client, "distiller.fit")
    for index, cell in enumerate(client.nb.cells[:at]):
        client.execute_cell(cell, index)
    fit.source = fit.source.replace('"epochs": 2', '"epochs": 2000')
    threading.Timer(15, os.kill, (client.km.provisioner.pid, signal.SIGINT)).start()  # as the stop button does
    with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
        client.execute_cell(fit, at)
    code = nbformat.v4.new_code_cell("import json; print(json.load(open('runs/notebook/history.json'))[-1]['epoch'])")
    client.nb.cells.append(code)
    client.execute_cell(code, at + 1)
    assert float(code.outputs[0]["text"]) >= 1
