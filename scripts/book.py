"""Execute the book's notebooks, build its pages, and refresh the outputs that are committed.

    python scripts/book.py execute            run what changed, into _build/executed
    python scripts/book.py html               pages from those runs, into _build/html, warnings being errors
    python scripts/book.py html --committed   pages from the notebooks as committed, into _build/committed
    python scripts/book.py html --draft       the same, whatever is missing or warned of, into _build/draft
    python scripts/book.py refresh            run what changed and write its outputs back into book/

`execute` and `refresh` take names (05-deleting-blocks) to run those notebooks only, and `execute` takes
parameters: `-p DATASET cifar10`.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
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
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import nbformat
import yaml
from filelock import FileLock, Timeout
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
BOOK, BUILD = ROOT / "book", ROOT / "_build"
EXECUTED, REPORTS, SCRATCH = BUILD / "executed", BUILD / "reports", BUILD / "scratch"
SECONDS = {"04-training": 120}  # what a notebook may take on two cores; the others 60
CELL_TIMEOUT = 900
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # cells that papermill puts in
KEPT = ("tags", "mystnb")  # what a cell's metadata may hold; editors and papermill add the rest
VERSIONS = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "matplotlib", "seaborn")
TOOLS = ("jupyter-book", "Sphinx", "sphinx-book-theme", "pydata-sphinx-theme", "myst-nb", "myst-parser")
MATHJAX = "static/mathjax/tex-svg.js"  # one file, glyphs included

BOOTSTRAP = """\
# On Colab only: fetch this book and install its library. scripts/book.py writes this cell.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    home = "/content/{name}"
    if not os.path.isdir(home):
        clone = ["git", "clone", "--quiet", "--depth", "1", "--branch", "{branch}"]
        subprocess.run([*clone, "{url}", home], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--editable", home + "[digits,cifar10,plots]"], check=True)
    sys.path.insert(0, home + "/lib")  # a running kernel does not notice a new editable install
    os.chdir(home + "/book")"""


class BookError(Exception):
    """What is wrong and what to do about it; printed without a traceback."""


# -- files ---------------------------------------------------------------------------------------------------


def write(path: Path, data: str | bytes) -> bool:
    """Write a file in one step, so that nothing ever sees half of it; say whether its content changed."""
    data = data.encode() if isinstance(data, str) else data
    if path.exists() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(data)
    os.replace(scratch, path)
    return True


def files(folder: Path) -> list[Path]:
    """Every file below a folder, in order, without caches and hidden ones."""
    hidden = re.compile(r"^(\..*|__pycache__|.*\.part)$")
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(p for p in found if not any(hidden.match(part) for part in p.relative_to(folder).parts))


def digest(parts: Iterable[object], paths: Iterable[Path] = (), below: Path = ROOT) -> str:
    """SHA-256 over JSON-able parts and over the names and contents of files."""
    sha = hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode())
    for path in paths:
        sha.update(f"\0{path.relative_to(below)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()


def pages() -> list[Path]:
    """The files of _toc.yml, in reading order; those that do not exist end in .missing."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    entries = [entry for part in toc.get("parts", [toc]) for entry in part.get("chapters", [])]
    stems = [toc["root"], *(entry["file"] for entry in entries)]
    return [next((p for p in (ROOT / f"{s}.ipynb", ROOT / f"{s}.md") if p.exists()), ROOT / f"{s}.missing")
            for s in stems]


def notebooks(names: Iterable[str] = ()) -> list[Path]:
    """The notebooks of the book, or those named; a name that is not in _toc.yml is an error."""
    known = {p.stem: p for p in pages() if p.suffix != ".md"}
    for name in names:
        if Path(name).stem not in known:
            raise BookError(f"{name} is no notebook of _toc.yml, which has: {', '.join(known)}")
    chosen = [known[Path(name).stem] for name in names] or list(known.values())
    for path in chosen:
        if path.suffix == ".missing":
            raise BookError(f"_toc.yml names {path.with_suffix('').relative_to(ROOT)}, which does not exist")
    return chosen


def read(path: Path) -> NotebookNode:
    """Read a notebook, naming it when it is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises its own, JSON's and validation errors
        raise BookError(f"{path} is not a readable notebook: {error}") from error


def is_code(cell: NotebookNode) -> bool:
    """Whether a cell has code."""
    return cell.cell_type == "code"


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return cell.metadata.get("tags", [])


# -- notebooks -----------------------------------------------------------------------------------------------


def bootstrap() -> str:
    """The code of the Colab cell; the repository's address comes from _config.yml."""
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    url = repository["url"].rstrip("/")
    return BOOTSTRAP.format(url=url, branch=repository["branch"], name=url.rsplit("/", 1)[-1])


def inputs() -> str:
    """A digest of all that a notebook may depend on besides its own code: library, data, helper files."""
    beside = [p for p in files(BOOK) if p.suffix not in {".ipynb", ".md", ".bib", ".png", ".svg", ".css"}]
    versions = {name: metadata.version(name) for name in VERSIONS}
    library = [p for p in files(ROOT / "lib") if ".egg-info" not in str(p)]
    return digest([versions, sys.version], [*library, *files(ROOT / "data"), *beside])


def key(notebook: NotebookNode, parameters: dict[str, object], depends: str) -> str:
    """What a run is known by. Prose is not part of it, so that editing text runs nothing again."""
    code = [[cell.source, "parameters" in tags(cell)] for cell in notebook.cells if is_code(cell)]
    return digest([code, parameters, depends])


def declared(notebook: NotebookNode) -> list[str]:
    """The names that the parameters cell assigns, papermill taking any other with no more than a warning."""
    trees = [ast.parse(cell.source) for cell in notebook.cells if "parameters" in tags(cell)]
    targets = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return [node.id for node in targets if isinstance(node.ctx, ast.Store)]


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
        if is_code(cell):
            cell.outputs = kept
    return notes


def with_outputs(path: Path, executed: NotebookNode) -> NotebookNode:
    """A notebook as it is now, with the outputs of a run of the same code."""
    notebook, cells = read(path), []
    runs = [cell for cell in executed.cells if is_code(cell)]
    for cell in notebook.cells:
        cells.append(cell)
        if is_code(cell):
            run = runs.pop(0) if runs else None
            if run is None or run.source != cell.source:
                raise BookError(f"{path.name} was edited while it ran: give the command again")
            cell.outputs, cell.execution_count = run.outputs, run.execution_count
        if runs and "injected-parameters" in tags(runs[0]):
            cells.append(runs.pop(0))
    notebook.cells = cells
    tidy(notebook)
    return notebook


def last_run(path: Path, depends: str) -> NotebookNode | None:
    """The stored run of a notebook, if it is of this code, library and data (with any parameters)."""
    stored = EXECUTED / path.name
    if not stored.exists():
        return None
    executed = read(stored)
    about = executed.metadata.get("run", {})
    return executed if about.get("key") == key(read(path), about.get("parameters", {}), depends) else None


# -- commands ------------------------------------------------------------------------------------------------


def worker(source: Path, target: Path, parameters: dict[str, object]) -> None:
    """Run one notebook; a fresh process does this, so that the peak memory is this notebook's alone."""
    import papermill

    report: dict[str, object] = {}
    start = time.perf_counter()
    try:
        papermill.execute_notebook(source, target, parameters, kernel_name="python3", language="python",
                                   cwd=BOOK, progress_bar=False, execution_timeout=CELL_TIMEOUT)
    except Exception as error:  # whatever stopped the notebook is reported by the parent process
        report["error"] = getattr(error, "ename", type(error).__name__)
        report["message"] = str(getattr(error, "evalue", error))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kibibytes, but bytes on macOS
    report["megabytes"] = round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)
    report["seconds"] = round(time.perf_counter() - start, 1)
    write(target.with_suffix(".json"), json.dumps(report))


def run(path: Path, notebook: NotebookNode, parameters: dict[str, object], run_key: str) -> NotebookNode:
    """Execute a notebook, as it was read, into _build/executed, and print what it took."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(dir=SCRATCH))  # a name of its own: a killed run may have left a worker
    source, target, log = scratch / "source.ipynb", scratch / path.name, scratch / "log.txt"
    nbformat.write(notebook, source)
    command = [sys.executable, __file__, "worker", source, target, json.dumps(parameters)]
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
    if not target.with_suffix(".json").exists():
        raise BookError(f"{path.name}: its process ended with code {code}\n{log.read_text()[-2000:]}")
    report = json.loads(target.with_suffix(".json").read_text())
    executed = read(target) if target.exists() else None
    if "error" in report:
        where = so_far = ""
        if executed is not None:
            cells = [cell for cell in executed.cells if not ADDED.intersection(tags(cell))]
            states = [cell.metadata.get("papermill", {}).get("status") for cell in cells]
            number = next((i for i, state in enumerate(states, 1) if state in {"failed", "running"}), None)
            where = f", cell {number} of {len(cells)}" if number else ""
            REPORTS.mkdir(parents=True, exist_ok=True)
            os.replace(target, REPORTS / path.name)
            so_far = f"\nno page was changed; as far as it got: _build/reports/{path.name}"
        raise BookError(f"{path.name}{where}: {report['error']}: {report['message']}{so_far}")
    notes = tidy(executed)
    cost = f"{report['seconds']:>7.1f} s{report['megabytes']:>7} MB"
    executed.metadata["run"] = {"key": run_key, "parameters": parameters, "cost": cost}
    write(EXECUTED / path.name, nbformat.writes(executed))
    for note in notes:
        print(f"warning: {path.name}, {note}", file=sys.stderr)
    limit = SECONDS.get(path.stem, 60)
    over = f"  over its limit of {limit} s" if report["seconds"] > limit else ""
    print(f"{path.stem:<34}{cost}{over}", flush=True)
    return executed


def execute(names: list[str], parameters: dict[str, object]) -> dict[Path, NotebookNode]:
    """Run every notebook whose code, library, data or parameters changed; return all runs, stored ones too."""
    chosen, runs = notebooks(names), {}
    known = {path.stem: declared(read(path)) for path in chosen}
    for name in set(parameters).difference(*known.values()):
        have = "\n".join(f"  {stem}: {', '.join(names)}" for stem, names in known.items() if names)
        raise BookError(f"no notebook to run has a parameter {name}; they have\n{have}")
    depends = inputs()
    for path in chosen:
        notebook, stored = read(path), last_run(path, depends)
        own = {name: value for name, value in parameters.items() if name in known[path.stem]}
        run_key = key(notebook, own, depends)
        if stored is not None and stored.metadata["run"]["key"] == run_key:
            print(f"{path.stem:<34}{stored.metadata['run']['cost']}  unchanged", flush=True)
            runs[path] = stored
        else:
            runs[path] = run(path, notebook, own, run_key)
    return runs


def html(committed: bool = False, draft: bool = False) -> None:
    """Build the pages from a copy that holds the book alone, and replace the old ones once that succeeded."""
    target = BUILD / ("draft" if draft else "committed" if committed else "html")
    source = BUILD / "source"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(BOOK, source / "book", ignore=shutil.ignore_patterns("*.ipynb", ".*", "__pycache__"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, source)
    for page in pages() if draft else ():
        if page.suffix == ".missing":
            (source / page.relative_to(ROOT)).with_suffix(".md").write_text(f"# {page.stem}: not written yet\n")
    depends = inputs()
    for path in [p for p in pages() if p.suffix == ".ipynb"] if draft else notebooks():
        executed = read(path) if committed or draft else last_run(path, depends)
        if executed is None:
            raise BookError(f"{path.stem} was not run as it is now: `scripts/book.py execute` does that")
        nbformat.write(with_outputs(path, executed), source / "book" / path.name)
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    (source / "book/_static/mathjax").mkdir(parents=True)
    shutil.copy(Path(package.origin).parent / MATHJAX, source / "book/_static/mathjax")

    made_from = digest([metadata.version(name) for name in TOOLS], files(source), source)
    stamp = target / ".made-from"
    if not (stamp.exists() and stamp.read_text() == made_from):
        start = time.perf_counter()
        command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", source]
        command += ["-q", "-n", "--keep-going", *([] if draft else ["-W"])]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
        log = re.sub(r"\x1b\[[\d;]*m", "", done.stderr + done.stdout).replace(f"{source}/", "")
        write(REPORTS / "html.log", log)
        complaints = [line for line in log.splitlines() if re.search("WARNING|ERROR|CRITICAL|rror:", line)]
        print("\n".join(complaints), file=sys.stderr, end="\n" if complaints else "")
        if done.returncode:
            raise BookError(f"the pages were not built: see {REPORTS.relative_to(ROOT)}/html.log"
                            f"{'; the old ones stay' if target.exists() else ''}")
        built = source / "_build/html"
        (built / stamp.name).write_text(made_from)
        old = BUILD / f"{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(built, target)
        shutil.rmtree(old, ignore_errors=True)
        print(f"pages{'':<29}{time.perf_counter() - start:>7.1f} s")
    print(f"open {target / 'index.html'}")


def refresh(names: list[str]) -> None:
    """Run what changed, and write outputs, metadata, Colab cells and the README's picture back into book/."""
    for path in notebooks(names):
        notebook = read(path)
        for cell in notebook.cells:
            if "colab" in tags(cell):
                cell.source = bootstrap()
        write(path, nbformat.writes(notebook) + "\n")
    for path, executed in execute(names, {}).items():
        refreshed = with_outputs(path, executed)
        refreshed.nbformat_minor = max(5, refreshed.nbformat_minor)
        if write(path, nbformat.writes(refreshed) + "\n"):
            print(f"wrote {path.relative_to(ROOT)}")
    front = pages()[0]
    picture = first_image(read(front)) if front.suffix == ".ipynb" else None
    if picture and write(BOOK / "images/overview.png", picture):
        print("wrote book/images/overview.png")


def first_image(notebook: NotebookNode) -> bytes | None:
    """The first PNG among a notebook's outputs."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    images = (output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    return next((base64.b64decode(image) for image in images), None)


def main() -> int:
    """Parse the command line, hold the lock on _build, and print errors without a traceback."""
    if sys.argv[1:2] == ["worker"]:
        worker(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
        return 0
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("execute", "refresh"):
        sub = commands.add_parser(name)
        sub.add_argument("names", nargs="*", metavar="NAME", help="notebooks to run (default: all)")
        if name == "execute":
            sub.add_argument("-p", dest="parameters", nargs=2, action="append", default=[],
                             metavar=("PARAMETER", "VALUE"), help="set a parameter (repeatable)")
    sub = commands.add_parser("html")
    sub.add_argument("--committed", action="store_true", help="use the outputs in book/; run nothing")
    sub.add_argument("--draft", action="store_true", help="pages so far, warnings allowed")
    arguments = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving so takes the worker process along
    BUILD.mkdir(exist_ok=True)
    lock = FileLock(BUILD / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("another command is at work in _build; waiting for it", file=sys.stderr)
            lock.acquire()
        if arguments.command == "execute":
            execute(arguments.names, {name: yaml.safe_load(text) for name, text in arguments.parameters})
        elif arguments.command == "html":
            html(arguments.committed, arguments.draft)
        else:
            refresh(arguments.names)
    except (BookError, OSError, yaml.YAMLError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was complete stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
