"""The figures of notebooks in the plain edition as vector drawings, with their captions, for slides and papers.

    figures.py _build/figures _build/plain/book/05-deleting-blocks.ipynb …

Each notebook runs again, and draws for print: figure-5.1.svg, figure-5.1.pdf, and figure-5.1.txt, the caption.
"""

from __future__ import annotations

import base64
import re
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import papermill

from book import BookError, write

FORMATS = {"image/svg+xml": "svg", "application/pdf": "pdf"}


def figures(notebook: nbformat.NotebookNode) -> dict[str, dict[str, str | bytes]]:
    """Return the drawings and captions of a notebook that has run, by the names of their files."""
    found: dict[str, dict[str, str | bytes]] = {}
    for cell, below in pairwise(notebook.cells):
        label = re.match(r"\*\*(Figure [\d.]+)\.\*\* ", below.source)
        data = [output.data for output in cell.get("outputs", []) if "data" in output]
        drawn = {FORMATS[kind]: base64.b64decode(text) if kind == "application/pdf" else text
                 for each in data for kind, text in each.items() if kind in FORMATS}
        if label and drawn:
            caption = below.source.replace(label[0], f"{label[1]}. ")
            found[label[1].lower().replace(" ", "-")] = drawn | {"txt": f"{caption}\n"}
    return found


def main(target: str, *paths: str) -> None:
    """Run notebooks and write what they draw."""
    for path in map(Path, paths):
        try:
            done = papermill.execute_notebook(
                path, None, kernel_name="python3", cwd=path.parent, progress_bar=False,
                extra_arguments=["--InlineBackend.figure_formats={'svg','pdf'}", "--IPKernelApp.log_level=ERROR"])
        except papermill.PapermillExecutionError as error:
            raise BookError(f"{path.name}: {error.ename}: {error.evalue}") from error
        for name, files in (drawings := figures(done)).items():
            for kind, content in files.items():
                write(Path(target, f"{name}.{kind}"), content)
        print(f"{path.stem:<34}{len(drawings):>4} figures", flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (BookError, OSError) as error:
        sys.exit(f"error: {error}")
