"""What papermill and Sphinx do not do themselves. The Makefile knows what depends on what, and calls this:

    book.py prepare [-p DATASET cifar10]         note the code and parameters of every notebook in _build/code
    book.py execute 05-deleting-blocks           run a notebook into _build/executed
    book.py pages _build/executed _build/html    build the pages from runs, warnings being errors
    book.py refresh 05-deleting-blocks           write the outputs of a run back into book/
"""

from __future__ import annotations

import argparse
import ast
import base64
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK, BUILD = ROOT / "book", ROOT / "_build"
CODE, EXECUTED, REPORTS = BUILD / "code", BUILD / "executed", BUILD / "reports"
CELL_TIMEOUT = 900  # seconds
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill puts in
KEPT = ("tags", "mystnb")  # what a cell's metadata may hold; editors and papermill add the rest
VERSIONS = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "seaborn")


class BookError(Exception):
    """What is wrong and what to do about it; printed without a traceback."""


def write(path: Path, data: str | bytes) -> bool:
    """Write a file in one step, unless it holds that already; return whether it was written."""
    data = data.encode() if isinstance(data, str) else data
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    scratch.write_bytes(data)
    os.replace(scratch, path)
    return True


def read(path: Path) -> NotebookNode:
    """Read a notebook, naming it when it is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own, JSON's and validation errors
        raise BookError(f"{path} is not a readable notebook: {error}") from error


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


def code(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def bootstrap() -> str:
    """The code of the Colab cell; the repository's address comes from _config.yml."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    url = address["url"].rstrip("/")
    cell = (ROOT / "scripts/colab.txt").read_text().rstrip()
    return cell.format(url=url, branch=address["branch"], name=url.rsplit("/", 1)[-1])


def declared(notebook: NotebookNode) -> list[str]:
    """The names that the parameters cell assigns; papermill takes any other with no more than a warning."""
    trees = [ast.parse(cell.source) for cell in code(notebook) if "parameters" in tags(cell)]
    names = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [node.id for node in names if isinstance(node.ctx, ast.Store)]


def tidy(notebook: NotebookNode) -> list[str]:
    """Strip what differs from run to run, and progress bars; return what else was written to stderr."""
    notes = []
    notebook.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for number, cell in enumerate(notebook.cells, 1):
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in KEPT and v})
        kept: list[NotebookNode] = []
        stderr = "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stderr")
        if stderr and "\r" not in stderr:  # a carriage return is a progress bar's
            notes.append(f"cell {number} wrote to stderr: {stderr.strip()}")
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
                kept[-1].text += output.text
            elif "application/vnd.jupyter.widget-view+json" not in output.get("data", {}):
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notes


def with_outputs(path: Path, executed: NotebookNode) -> NotebookNode:
    """A notebook as it is now, with the outputs of a run of the same code; the Colab cell's code does not count."""
    notebook, runs, cells = read(path), code(executed), []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.cell_type == "code":
            run = runs.pop(0) if runs else None
            if run is None or (run.source != cell.source and "colab" not in tags(cell)):
                raise BookError(f"{path.name} is not the one that ran: give the command again")
            cell.outputs, cell.execution_count = run.outputs, run.execution_count
        if runs and "injected-parameters" in tags(runs[0]):
            cells.append(runs.pop(0))
    notebook.cells = cells
    tidy(notebook)
    return notebook


def prepare(*options: str) -> None:
    """Note what a run depends on beside library and data, rewriting no note that still holds.

    Prose, outputs and the Colab cell are not part of it.
    """
    parser = argparse.ArgumentParser(prog="PARAMETERS", usage='make book PARAMETERS="-p DATASET cifar10"')
    parser.add_argument("-p", dest="given", nargs=2, action="append", default=[])
    given = {name: yaml.safe_load(text) for name, text in parser.parse_args(options).given}
    paths = sorted(BOOK.glob("*.ipynb"))
    known = {path: declared(read(path)) for path in paths}
    for name in set(given).difference(*known.values()):
        have = "\n".join(f"  {path.stem}: {', '.join(names)}" for path, names in known.items() if names)
        raise BookError(f"no notebook has a parameter {name}; they have\n{have}")
    for path in paths:
        cells = [[cell.source, "parameters" in tags(cell)] for cell in code(read(path)) if "colab" not in tags(cell)]
        own = {name: value for name, value in given.items() if name in known[path]}
        write(CODE / f"{path.stem}.json", json.dumps({"parameters": own, "cells": cells}))
    write(CODE / "versions.json", json.dumps([sys.version, *map(metadata.version, VERSIONS)]))


def execute(name: str) -> None:
    """Run a notebook and print its seconds and its peak memory; a run that fails leaves a report, and nothing else."""
    import papermill

    report, start = REPORTS / f"{name}.ipynb", time.time()
    REPORTS.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    try:
        executed = papermill.execute_notebook(
            read(BOOK / f"{name}.ipynb"), report, json.loads((CODE / f"{name}.json").read_text())["parameters"],
            kernel_name="python3", language="python", cwd=BOOK, progress_bar=False, execution_timeout=CELL_TIMEOUT,
            extra_arguments=["--IPKernelApp.log_level=ERROR"])  # a kernel warns about its sockets
    except Exception as error:  # whatever stopped the notebook
        cells = [c for c in read(report).cells if not ADDED.intersection(tags(c))] if report.exists() else []
        begun = [i for i, c in enumerate(cells, 1) if c.metadata.get("papermill", {}).get("status") != "pending"]
        where = f", cell {begun[-1]} of {len(cells)}" if begun else ""
        raise BookError(f"{name}.ipynb{where}: {getattr(error, 'ename', type(error).__name__)}: "
                        f"{getattr(error, 'evalue', error)}\nas far as it got: {report.relative_to(ROOT)}") from error
    for note in tidy(executed):
        print(f"warning: {name}.ipynb, {note}", file=sys.stderr)
    write(EXECUTED / report.name, nbformat.writes(executed))
    os.utime(EXECUTED / report.name, (start, start))  # whatever is edited during a run is newer than it
    report.unlink()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kibibytes, but bytes on macOS
    megabytes = peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(f"{name:<34}{time.time() - start:>7.1f} s{megabytes:>7.0f} MB", flush=True)


def pages(runs: str, target: str) -> None:
    """Build the pages from a copy that holds the book alone, and replace the old ones once that succeeded."""
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="pages-") as scratch:
        source, start = Path(scratch, "source").resolve(), time.time()
        shutil.copytree(BOOK, source / "book", ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__"))
        for name in ("_config.yml", "_toc.yml"):
            shutil.copy(ROOT / name, source)
        for path in BOOK.glob("*.ipynb"):
            nbformat.write(with_outputs(path, read(ROOT / runs / path.name)), source / "book" / path.name)
        package = importlib.util.find_spec("sphinx-mathjax-offline")
        (source / "book/_static/mathjax").mkdir(parents=True)
        script = Path(package.origin).with_name("static") / "mathjax/tex-svg.js"  # one file, glyphs included
        shutil.copy(script, source / "book/_static/mathjax")
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
        done = subprocess.run([*command, "build", source, "-q", "-n", "-W", "--keep-going"], capture_output=True,
                              text=True, env={**os.environ, "NO_COLOR": "1"})
        log = re.sub(r"\x1b\[[\d;]*m", "", done.stderr + done.stdout).replace(f"{source}/", "")
        write(REPORTS / "pages.log", log)
        if done.returncode:
            complaints = [line for line in log.splitlines() if re.search("WARNING|ERROR|CRITICAL|rror:", line)]
            raise BookError("\n".join([*complaints, "the pages were not built, and the old ones stay: "
                                       f"{REPORTS.relative_to(ROOT)}/pages.log has the rest"]))
        os.utime(source / "_build/html/index.html", (start, start))
        if Path(target).exists():
            os.replace(target, Path(scratch, "old"))
        os.replace(source / "_build/html", target)
    print(f"{'pages':<34}{time.time() - start:>7.1f} s", flush=True)


def refresh(*names: str) -> None:
    """Write outputs, metadata, Colab cells and the README's picture back into book/."""
    for path in (BOOK / f"{name}.ipynb" for name in names):
        notebook = with_outputs(path, read(EXECUTED / path.name))
        notebook.nbformat_minor = max(5, notebook.nbformat_minor)
        for cell in notebook.cells:
            if "colab" in tags(cell):
                cell.source = bootstrap()
        if write(path, nbformat.writes(notebook) + "\n"):
            print(f"wrote {path.relative_to(ROOT)}")
    picture = first_image(read(BOOK / "index.ipynb"))
    if picture and write(BOOK / "images/overview.png", picture):
        print("wrote book/images/overview.png")


def first_image(notebook: NotebookNode) -> bytes | None:
    """The first PNG among a notebook's outputs."""
    data = (output.get("data", {}) for cell in code(notebook) for output in cell.outputs)
    return next((base64.b64decode(kinds["image/png"]) for kinds in data if "image/png" in kinds), None)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit takes the kernel along
    try:
        {"prepare": prepare, "execute": execute, "pages": pages, "refresh": refresh}[sys.argv[1]](*sys.argv[2:])
    except (BookError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
