"""Run the notebooks and save them with their outputs: ``make notebooks``.

python notebooks/execute.py [NAME.ipynb ...]

Figures become PNGs (kaleido, with a local Chrome or Chromium), so that the files are small and can be
read anywhere. What differs from one run to the next and says nothing - times, ids - is left out.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
PICTURES = "png"


def executed(path: Path, renderer: str) -> Any:
    """One notebook, run from its first cell to its last in a kernel of this interpreter.

    Args:
        path: The file; it is not changed.
        renderer: What plotly's figures become; a name that ``plotly.io.renderers`` knows.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    # In front: a notebook shows the checkout it lies in.
    search = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PLOTLY_RENDERER": renderer,
        "PYTHONPATH": os.pathsep.join(search),
        "HF_HUB_OFFLINE": "1",
        # tqdm's, where ipywidgets is not installed; it names this machine's folders.
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    return client.execute(env=environment)


def cleaned(notebook: Any) -> Any:
    """The notebook without what changes from run to run."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            if "metadata" in output:
                output["metadata"] = {}
    return notebook


def main(names: list[str]) -> None:
    """Run the notebooks that are named, or all."""
    for path in [FOLDER / name for name in names] or sorted(FOLDER.glob("*.ipynb")):
        print(path.name, file=sys.stderr)  # noqa: T201
        nbformat.write(cleaned(executed(path, PICTURES)), path)


if __name__ == "__main__":
    main(sys.argv[1:])
