"""What papermill and Sphinx do not do themselves. The Makefile knows what depends on what, and calls this:

    book.py prepare [-p DATASET cifar10]         note the code and parameters of every notebook in _build/code
    book.py execute 05-deleting-blocks           run a notebook into _build/executed
    book.py pages _build/executed _build/html    build the pages from runs, warnings being errors
    book.py refresh 05-deleting-blocks           write the outputs of a run back into book/
    book.py owner https://github.com/you/book    name the repository, wherever it is named
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import csv
import inspect
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK, BUILD = ROOT / "book", ROOT / "_build"
CODE, EXECUTED, REPORTS = BUILD / "code", BUILD / "executed", BUILD / "reports"
CELL_TIMEOUT = 900  # seconds
LIMITS = {"04-training": (1500, 120)}  # others: what Binder gives, and patience
LIMIT = (1500, 60)  # megabytes, and seconds of two cores, which count in `make test` alone: machines differ
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill puts in
KEPT = ("tags", "mystnb")  # what a cell's metadata may hold; editors and papermill add the rest
PLACEHOLDER = "# placeholder"  # what follows the repository's address in _config.yml until somebody owns it
SHARED = ("binder", "book", "data", "experiments", "lib", "pyproject.toml", "README.md", "LICENSE")  # what Binder needs
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
    try:
        scratch.write_bytes(data)
        os.replace(scratch, path)
    except OSError as error:  # a full disk's error does not say which file it met
        scratch.unlink(missing_ok=True)
        raise BookError(f"{path} was not written: {error.strerror}; an earlier one is as it was") from error
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


def settings() -> dict[str, Any]:
    """What _config.yml says."""
    return yaml.safe_load((ROOT / "_config.yml").read_text())


def bootstrap(beside: str | None = None) -> str:
    """The code of the Colab cell, for a notebook that imports a module from beside it, or none of these."""
    address = settings()["repository"]
    url = address["url"].rstrip("/")
    cell = (ROOT / "scripts/colab.txt").read_text().rstrip()
    return cell.format(url=url, branch=address["branch"], name=url.rsplit("/", 1)[-1],
                       condition=f' or importlib.util.find_spec("{beside}") is None' if beside else "",
                       reason=f", or {beside}.py does not lie beside this notebook" if beside else "")


def beside(notebook: NotebookNode) -> str | None:
    """The module of book/ that a notebook imports, if it does."""
    own = "|".join(path.stem for path in BOOK.glob("*.py")) or "(?!)"
    found = (re.search(rf"^(?:import|from) ({own})\b", cell.source, flags=re.M) for cell in code(notebook))
    return next((match[1] for match in found if match), None)


def declared(notebook: NotebookNode) -> dict[str, Any]:
    """What the parameters cell assigns; papermill takes any other name with no more than a warning."""
    trees = [ast.parse(cell.source).body for cell in code(notebook) if "parameters" in tags(cell)]
    lines = [line for tree in trees for line in tree if isinstance(line, ast.Assign)]
    return {target.id: ast.literal_eval(line.value) for line in lines for target in line.targets}


def refuse(name: str, value: Any, default: Any) -> None:
    """Raise unless a parameter may have this value: one of the kind of its default, and in range."""
    folder, kind = ROOT / "data/results", type(default)
    named = {"DATASET": {path.name for path in folder.glob("*/")}, "RECIPE": {"default"}}.get(name)
    for table in folder.glob("*/networks.csv") if name == "RECIPE" else []:
        named |= {row["recipe"] for row in csv.DictReader(table.open())}
    if named:
        fits, wanted = value in named, "one of " + ", ".join(sorted(named))
    elif default is None or kind is int:
        least = 0 if default == 0 else 1  # what is 0 at first may be 0: a seed, "as many as usual"
        fits = (type(value) is int and least <= value < 2**31) or (value is None and default is None)
        own = ", or null for the page's own choice" * (default is None)
        wanted = f"a whole number of at least {least}, below {2**31}{own}"
    else:
        fits, wanted = type(value) is kind, {bool: "true or false", str: "text"}.get(kind, f"a {kind.__name__}")
    if not fits:
        raise BookError(f"the parameter {name} cannot be {value!r}: it takes {wanted}")


def tidy(notebook: NotebookNode) -> list[str]:
    """Strip what differs from run to run, and progress bars; return what else was written to stderr."""
    notes = []
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
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
    given = {}
    for name, text in parser.parse_args(options).given:
        try:
            given[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BookError(f"the parameter {name} cannot be {text}, which is no YAML: {error}") from error
    notebooks = {path.stem: read(path) for path in sorted(BOOK.glob("*.ipynb"))}
    known = {stem: declared(notebook) for stem, notebook in notebooks.items()}
    for name in set(given).difference(*known.values()):
        have = "\n".join(f"  {stem}: {', '.join(names)}" for stem, names in known.items() if names)
        raise BookError(f"no notebook has a parameter {name}; they have\n{have}")
    for stem, notebook in notebooks.items():
        cells = [[cell.source, "parameters" in tags(cell)] for cell in code(notebook) if "colab" not in tags(cell)]
        own = {name: given[name] for name in known[stem] if name in given}
        for name, value in own.items():
            refuse(name, value, known[stem][name])
        write(CODE / f"{stem}.json", json.dumps({"parameters": own, "cells": cells}))
    write(CODE / "versions.json", json.dumps([sys.version, *map(metadata.version, VERSIONS)]))


def execute(name: str) -> None:
    """Run a notebook and print its seconds and its peak memory; a run that fails leaves a report, and nothing else.

    A run above the limits fails too, unless it has parameters of its own. Seconds are those of two cores at work.
    """
    import papermill

    report, start = REPORTS / f"{name}.ipynb", time.time()
    parameters = json.loads((CODE / f"{name}.json").read_text())["parameters"]
    REPORTS.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    try:
        executed = papermill.execute_notebook(
            read(BOOK / f"{name}.ipynb"), report, parameters, kernel_name="python3", language="python", cwd=BOOK,
            progress_bar=False, execution_timeout=CELL_TIMEOUT,
            extra_arguments=["--IPKernelApp.log_level=ERROR"])  # a kernel warns about its sockets
    except OSError as error:  # of the report; a cell's would come as papermill's own
        raise BookError(f"{report.relative_to(ROOT)} could not be written: {error}") from error
    except Exception as error:  # whatever stopped the notebook
        cells = [c for c in read(report).cells if not ADDED.intersection(tags(c))] if report.exists() else []
        begun = sum(cell.metadata.papermill.start_time is not None for cell in cells)
        where = f", cell {begun} of {len(cells)}" if begun else ""
        raise BookError(f"{name}.ipynb{where}: {getattr(error, 'ename', type(error).__name__)}: "
                        f"{getattr(error, 'evalue', error)}\nas far as it got: {report.relative_to(ROOT)}") from error
    for note in tidy(executed):
        print(f"warning: {name}.ipynb, {note}", file=sys.stderr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    megabytes = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6  # kibibytes, but bytes on macOS
    seconds, (most, longest) = (used.ru_utime + used.ru_stime) / 2, LIMITS.get(name, LIMIT)
    print(f"{name:<34}{time.time() - start:>7.1f} s{megabytes:>7.0f} MB", flush=True)
    if not parameters and (megabytes > most or (seconds > longest and "LIMITED" in os.environ)):
        raise BookError(f"{name}.ipynb used {megabytes:.0f} MB and {seconds:.0f} s of two cores; it may use "
                        f"{most} MB and {longest} s: see LIMITS in scripts/book.py")
    write(EXECUTED / report.name, nbformat.writes(executed))
    os.utime(EXECUTED / report.name, (start, start))  # whatever is edited during a run is newer than it
    report.unlink()


def pages(runs: str, target: str) -> None:
    """Build the pages from a copy that holds the book alone, and replace the old ones once that succeeded."""
    from jupyter_book.sphinx import build_sphinx

    if PLACEHOLDER in (ROOT / "_config.yml").read_text():
        print("warning: the repository's address in _config.yml is a placeholder, so links to Colab, Binder and the "
              "repository lead nowhere: make owner URL=https://github.com/you/book", file=sys.stderr)

    scratch, start, log = Path(f"{target}.new").resolve(), time.time(), io.StringIO()
    shutil.rmtree(scratch, ignore_errors=True)  # left by a builder that was killed
    try:
        source, html, copy = (scratch / name for name in ("source", "html", "plain"))
        shutil.copytree(BOOK, source / "book", ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__"))
        shutil.copy(ROOT / "_toc.yml", source)
        config = settings()
        config["repository"]["branch"] = "plain"  # which launch buttons open
        write(source / "_config.yml", yaml.safe_dump(config, allow_unicode=True))
        for path in BOOK.glob("*.ipynb"):
            write(source / "book" / path.name, nbformat.writes(with_outputs(path, read(ROOT / runs / path.name))))
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            failed = build_sphinx(source, html, path_config=source / "_config.yml", noconfig=True,
                                  confoverrides={"external_toc_path": str(source / "_toc.yml"), "nitpicky": True,
                                                 "latex_individualpages": False},
                                  quiet=True, warningiserror=True, keep_going=True)
        text = re.sub(r"\x1b\[[\d;]*m", "", log.getvalue()).replace(f"{source}/", "")
        write(REPORTS / "pages.log", text)
        if failed:
            complaints = [line for line in text.splitlines() if re.search("WARNING|ERROR|CRITICAL|rror:", line)]
            raise BookError("\n".join([*complaints, f"the pages were not built in {BUILD}, and the old ones stay: "
                                       f"{REPORTS.relative_to(ROOT)}/pages.log has the rest"]))
        publish(html, copy, sorted((source / "book").glob("*.ipynb")))
        os.utime(html / "index.html", (start, start))
        for new, old in ((html, Path(target)), (copy, BUILD / "plain")):
            if old.exists():
                os.replace(old, scratch / f"old {new.name}")
            os.replace(new, old)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{'pages':<34}{time.time() - start:>7.1f} s", flush=True)


def publish(html: Path, target: Path, notebooks: list[Path]) -> None:
    """Write the plain editions, which are the pages' downloads too, into a copy of the repository.

    Colab and Binder open it, from a branch of its own.
    """
    import plain

    owner, name = settings()["repository"]["url"].rstrip("/").rsplit("/", 2)[1:]
    references = plain.known(html, BOOK / "references.bib", f"https://{owner}.github.io/{name}")
    for path in notebooks:
        notebook = read(path)
        try:
            text = nbformat.writes(plain.plain(notebook, references, bootstrap(beside(notebook))))
        except plain.NotPlain as error:
            raise BookError(f"{path.name}: {error}") from error
        for folder in (target / "book", html / "_sources/book"):
            write(folder / path.name, text)
    unwanted = shutil.ignore_patterns("*.ipynb", "*.egg-info", "__pycache__", ".*")
    shutil.copytree(ROOT, target, dirs_exist_ok=True, ignore=lambda folder, names:
                    set(names).difference(SHARED) if Path(folder) == ROOT else unwanted(folder, names))
    (html / "references.json").unlink()


def owner(url: str) -> None:
    """Name the repository, wherever it is named, and no longer a placeholder."""
    kinds, pattern = {".md", ".ipynb", ".yml", ".cff", ".toml"}, r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?"
    old, new = (re.fullmatch(pattern, address) for address in (settings()["repository"]["url"], url))
    if not old or not new:
        raise BookError(f"URL={url}: expected one such as https://github.com/you/book")
    (was, book), (now, name) = old.groups(), new.groups()
    for path in [p for p in [*ROOT.glob("*"), *ROOT.glob("[!._]*/**/*")] if p.suffix in kinds and p.is_file()]:
        text = path.read_text().replace(f"{was}/{book}", f"{now}/{name}").replace(f"  {PLACEHOLDER}", "")
        if write(path, text.replace(f'abspath(\\"{book}\\")', f'abspath(\\"{name}\\")')):  # in Colab cells
            print(f"wrote {path.relative_to(ROOT)}")


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


def follow(parent: int) -> None:
    """End this process when the one that started it has gone, even by SIGKILL."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # end this at once, and a kernel follows; also where a shell had it
        signal.signal(ending, signal.SIG_DFL)  # ignore the former, as in the background
    threading.Thread(target=follow, args=[os.getppid()], daemon=True).start()
    commands = {each.__name__: each for each in (prepare, execute, pages, refresh, owner)}
    try:
        inspect.signature(commands[sys.argv[1]]).bind(*sys.argv[2:])
    except (LookupError, TypeError):
        sys.exit(__doc__)
    try:
        commands[sys.argv[1]](*sys.argv[2:])
    except (BookError, OSError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
