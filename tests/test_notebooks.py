"""The book's own rules, applied to its notebooks and to bad examples.

A policy is a function from a notebook to a list of complaints. Each is run over every committed notebook, which
must draw none, and over a notebook spoilt in one way, which must draw that complaint.
"""

import ast
import base64
import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("book", ROOT / "scripts/book.py")
book = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(book)

code = book.code
TAGS = {"colab", "remove-cell", "remove-input", "hide-input", "hide-output", "parameters",
        "nbval-check-output", "nbval-skip"}
WITHOUT_PARAMETERS = {"index", "claims", "how-fast"}


# -- policies ------------------------------------------------------------------------------------------------


def title_first(notebook):
    first = notebook.cells[0]
    return [] if first.cell_type == "markdown" and first.source.startswith("# ") else ["starts without a title"]


def executed_in_order(notebook):
    counts = [cell.execution_count for cell in code(notebook)]
    return [] if counts and counts == [*range(1, len(counts) + 1)] else [f"execution counts are {counts}"]


def nothing_vacuous(notebook):
    empty = [f"code cell {i} is empty" for i, cell in enumerate(code(notebook), 1) if not cell.source.strip()]
    return empty + [f"code cell {i} compares no output" for i, cell in enumerate(code(notebook), 1)
                    if "nbval-check-output" in book.tags(cell) and not cell.outputs]


def no_errors(notebook):
    kinds = [(o.output_type, o.get("name")) for cell in code(notebook) for o in cell.outputs]
    return ["stores an error" for kind, _ in kinds if kind == "error"] + \
           ["stores stderr" for _, name in kinds if name == "stderr"]


def images(cell):
    return [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def figures_described(notebook):
    found = []
    for cell in code(notebook):
        if not images(cell):
            continue
        settings = cell.metadata.get("mystnb", {})
        figure, alt = settings.get("figure", {}), settings.get("image", {}).get("alt", "")
        if len(images(cell)) > 1:
            found.append("two images in one cell")
        if not figure.get("name", "").startswith("fig-"):
            found.append(f"figure name {figure.get('name')!r} is not fig-…")
        if len(figure.get("caption", "").split()) < 3:
            found.append("figure without a caption")
        if len(alt.split()) < 5 or alt == figure.get("caption"):
            found.append("figure without an alt text of its own")
        if figure.get("name", "").endswith("cifar10") and not ("digits" in alt and "CIFAR-10" in alt):
            found.append("an alt text that leaves out one of two data sets")
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return found + ["Markdown image without alt text" for text in texts if re.search(r"!\[\s*\]\(", text)]


def known_tags(notebook):
    return [f"unknown tag {tag}" for cell in notebook.cells for tag in book.tags(cell) if tag not in TAGS]


NAMED = r"(?:Python|PyTorch|torch|CC BY|[Vv]ersion|[Ss]ections?|§|≥|>=)\s*\d+(?:\.\d+)+"
LEVEL = r"\b(?:90|95|99)\s*%\s*(?:confidence\s+)?(?:intervals?|bands?)"
UNIT = r"(?:%|per ?cent|points?|seconds?|minutes?|hours?|ms|s|MB|GB|times)"
NUMBER = re.compile(rf"\d+\.\d+|\d\s*(?:{UNIT})(?!\w)|\d\s*×(?!\s*\d)")


def without_code(text):
    """Markdown without its code and math blocks; the content of admonitions and other directives stays."""
    kept, inside, block = [], [], None
    for line in text.splitlines():
        fence = re.match(r"\s*(`{3,}|~{3,}|:{3,})\s*(?:\{([\w-]+)\})?\s*(.*)", line)
        if block:
            block = None if fence and fence[1] == block and not fence[2] and not fence[3] else block
        elif fence and fence[2] and fence[2] not in {"code", "code-block", "code-cell", "math"}:
            inside.append(fence[1])
            kept += ["", fence[3]]
        elif fence and not fence[2] and not fence[3] and fence[1] in inside:
            inside.remove(fence[1])
            kept.append("")
        elif fence:
            block = fence[1]
            kept.append("")
        else:
            kept.append(line)
    return re.sub(r"\$\$.*?\$\$|\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", "\n".join(kept), flags=re.S)


def no_typed_numbers(notebook):
    """Numbers that look measured: decimals, or with a unit. Code, math and cited paragraphs are exempt, and
    any paragraph that says why: <!-- number: the reason -->.
    """
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s)", without_code(cell.source)):
            if "{cite" in paragraph or re.search(r"<!-- number: \S.*?-->", paragraph):
                continue
            bare = re.sub(r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)|<[^>]*>|https?://\S+", "", paragraph)
            bare = re.sub(f"{NAMED}|{LEVEL}", "", bare)
            found += [f"typed number {match.group()!r} in: {bare.strip()[:70]}" for match in NUMBER.finditer(bare)]
    return found


def small(notebook):
    size = len(nbformat.writes(notebook).encode())
    return [] if size < 1_200_000 else [f"is {size} bytes"]


def tidy(notebook):
    kernel = {k: v for k, v in notebook.metadata.items() if k not in ("kernelspec", "language_info")}
    found = [f"notebook metadata {name}" for name in kernel]
    found += [f"cell metadata {name}" for cell in notebook.cells for name in cell.metadata if name not in book.KEPT]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    return found + ["injected parameters" for cell in notebook.cells if "injected-parameters" in book.tags(cell)]


def colab_cell(notebook):
    cells = [i for i, cell in enumerate(notebook.cells) if "colab" in book.tags(cell)]
    if cells != [1] or "remove-cell" not in book.tags(notebook.cells[1]):
        return ["the second cell, and it alone, must be tagged colab and remove-cell"]
    return [] if notebook.cells[1].source == book.bootstrap() else ["Colab cell is not as `make refresh` writes it"]


def has_parameters(notebook):
    count = sum("parameters" in book.tags(cell) for cell in notebook.cells)
    return [] if count == 1 else [f"{count} cells tagged parameters"]


def no_machine_paths(notebook):
    text = nbformat.writes(notebook)
    places = {str(Path.home()), str(ROOT)} - {"/"}
    pattern = "|".join([*map(re.escape, places), r"(?<![\w.:/])/(?:home|Users|root|tmp)/"])
    return sorted({f"names a place on the machine that ran it: {m}" for m in re.findall(pattern, text)})


# Code on the page is the idea: what sets up or shows is folded away or removed. By statement, in the cells whose code
# a reader sees without a click; a compound statement counts by its parts, and blank lines and comments do not count.
FOLDED = {"hide-input", "remove-input", "remove-cell"}
SETTING_UP = {"use_style", "load_dataset", "filterwarnings", "set_flush_denormal"}
SHOWING = {"plt", "plots", "fig", "ax", "axes", "Markdown", "HTML", "display", "print", "to_string", "rename", "round"}


def lines_by_purpose(body, purpose=None):
    """Purpose ("setup", "display" or "idea") and number of lines of every statement."""
    for node in body:
        inner = [s for part in ("body", "orelse", "finalbody") for s in getattr(node, part, [])]
        inner += [s for handler in getattr(node, "handlers", []) for s in handler.body]
        if inner:
            yield purpose or "idea", max(inner[0].lineno - node.lineno, 1)
            yield from lines_by_purpose(inner, purpose)
            continue
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        setup = isinstance(node, ast.Import | ast.ImportFrom) or names & SETTING_UP
        kind = "setup" if setup else "display" if names & SHOWING else "idea"
        yield purpose or kind, node.end_lineno - node.lineno + 1


def code_is_the_idea(notebook):
    lines = dict.fromkeys(("setup", "display", "idea"), 0)
    for cell in code(notebook):
        if not FOLDED & set(book.tags(cell)):
            purpose = "setup" if "parameters" in book.tags(cell) else None
            for kind, count in lines_by_purpose(ast.parse(cell.source).body, purpose):
                lines[kind] += count
    other, every = lines["setup"] + lines["display"], sum(lines.values())
    return [f"{other} of {every} visible code lines set up or show"] if 3 * other > every else []


def one_setup_cell(notebook):
    cells = [cell for cell in code(notebook) if "colab" not in book.tags(cell)]
    importing = [cell for cell in cells
                 if any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body)]
    found = [] if len(importing) == 1 else [f"{len(importing)} cells import"]
    return found + ["imports in full view" for cell in importing if not FOLDED & set(book.tags(cell))]


def narrow(notebook):
    found = []
    for cell in code(notebook):
        if not {"remove-input", "remove-cell"} & set(book.tags(cell)):
            found += [f"a line of {len(line)} columns: {line.strip()[:40]}" for line in cell.source.splitlines()
                      if len(line) > 80]
    return found


CHAPTER_POLICIES = {code_is_the_idea, one_setup_cell}
POLICIES = [title_first, executed_in_order, nothing_vacuous, no_errors, figures_described, known_tags,
            no_typed_numbers, small, tidy, colab_cell, has_parameters, no_machine_paths, code_is_the_idea,
            one_setup_cell, narrow]
NOTEBOOKS = sorted(ROOT.glob("book/**/*.ipynb"))


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[0].isdigit()], ids=lambda path: path.stem)
def test_the_cost_that_a_chapter_names_is_the_limit_at_which_the_builder_fails(path):
    megabytes, seconds = book.LIMITS.get(path.stem, book.LIMIT)
    time = {60: "a minute", 120: "two minutes"}[seconds]
    said = f"**Cost.** At most {time} on two cores and {megabytes / 1000:g} GB of memory"
    assert said in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path, policy):
    if policy is has_parameters and path.stem in WITHOUT_PARAMETERS:
        return
    if policy in CHAPTER_POLICIES and not path.stem[:2].isdigit():
        return
    assert policy(book.read(path)) == []


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def good():
    """A notebook that keeps every rule."""
    figure = {"figure": {"name": "fig-a", "caption": "Error against depth."},
              "image": {"alt": "A line that rises from left to right."}}
    notebook = new_notebook(cells=[
        new_markdown_cell("# Title"),
        new_code_cell(book.bootstrap(), metadata={"tags": ["remove-cell", "colab"]}),
        new_markdown_cell(
            "Needs Python 3.10 and a 95 % interval; licensed CC BY 4.0. The tolerance is 1e-12, the chain has 54 "
            "units in 3 stages, depth is $6n+2$ with $p = 0.05$, `alpha = 0.5`.\n\n"
            "The paper reports 6.10 % {cite}`veit2016`.\n\n```python\nx = 0.25  # 3 s\n```\n\n"
            "$$ 0.5 + 0.5 = 1 $$\n\n<!-- number: a definition, not a measurement --> A layer adds 0.5 units."),
        new_code_cell("N = 3", metadata={"tags": ["parameters"]}),
        new_code_cell("plots.draw(N)", metadata={"tags": ["hide-input"], "mystnb": figure},
                      outputs=[new_output("display_data", {"image/png": PNG})]),
        new_code_cell("for i in range(N):\n    total = i\n    # a comment\n\n    N += total\n    N -= 1\nprint(N)",
                      metadata={"tags": ["nbval-check-output"]},
                      outputs=[new_output("stream", name="stdout", text="3\n")]),
        new_code_cell("import torch", metadata={"tags": ["hide-input"]}),
    ])
    for count, cell in enumerate(code(notebook), 1):
        cell.execution_count = count
    book.tidy(notebook)
    return notebook


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.__name__)
def test_policy_accepts_a_good_notebook(policy):
    assert policy(good()) == []


def prose(text):
    return lambda nb: nb.cells.append(new_markdown_cell(text))


def output(index, *args, **kwargs):
    return lambda nb: nb.cells[index].outputs.append(new_output(*args, **kwargs))


def figure(**changes):
    def spoil(nb):
        for path, value in changes.items():
            section, name = path.split("_")
            nb.cells[4].metadata["mystnb"][section][name] = value
    return spoil


BAD = {
    "no title": (title_first, lambda nb: nb.cells.pop(0), "without a title"),
    "never run": (executed_in_order, lambda nb: [c.update(execution_count=None) for c in code(nb)], "None"),
    "run out of order": (executed_in_order, lambda nb: nb.cells[3].update(execution_count=7), "7"),
    "one cell not run": (executed_in_order, lambda nb: nb.cells[5].update(execution_count=None), "None"),
    "empty cell": (nothing_vacuous, lambda nb: nb.cells[3].update(source=" "), "empty"),
    "nothing to compare": (nothing_vacuous, lambda nb: nb.cells[5].update(outputs=[]), "compares no output"),
    "an error": (no_errors, output(3, "error", ename="E", evalue="", traceback=[]), "an error"),
    "stderr": (no_errors, output(3, "stream", name="stderr", text="warning"), "stderr"),
    "no caption": (figures_described, figure(figure_caption=""), "caption"),
    "no alt text": (figures_described, figure(image_alt=""), "alt text"),
    "alt text is caption": (figures_described, figure(image_alt="Error against depth."), "alt text"),
    "half an alt text": (
        figures_described, figure(figure_name="fig-a-cifar10", image_alt="On the digits it rises."), "leaves out one"),
    "figure name": (figures_described, figure(figure_name="a"), "fig-"),
    "nothing said": (figures_described, lambda nb: nb.cells[4].update(metadata={}), "caption"),
    "two images": (figures_described, output(4, "display_data", {"image/svg+xml": "<svg/>"}), "two images"),
    "bare image": (figures_described, prose("![](images/a.png)"), "Markdown image"),
    "tag": (known_tags, lambda nb: nb.cells[3].metadata.update(tags=["remove_cell"]), "remove_cell"),
    "decimal": (no_typed_numbers, prose("The error is 0.12 here."), "0.12"),
    "per cent": (no_typed_numbers, prose("It costs 7 % more."), "7 %"),
    "percent sign": (no_typed_numbers, prose("About 12% of them."), "2%"),
    "points": (no_typed_numbers, prose("It rises by 3 points."), "3 points"),
    "seconds": (no_typed_numbers, prose("It takes 20 s."), "0 s"),
    "memory": (no_typed_numbers, prose("It needs 800 MB."), "0 MB"),
    "ratio": (no_typed_numbers, prose("It is 34× larger."), "4×"),
    "in an admonition": (no_typed_numbers, prose("```{note}\nThe error is 0.12.\n```"), "0.12"),
    "after two blocks": (no_typed_numbers, prose("```\na\n```\n\n0.12 a\n\n```\nb\n```"), "0.12"),
    "in an admonition's title": (no_typed_numbers, prose(":::{tip} It is 0.12\n:::"), "0.12"),
    "after an admonition with code": (
        no_typed_numbers, prose("````{note}\n```\na = 0.5\n```\n````\nThen 0.12 b"), "0.12"),
    "beside a citation": (no_typed_numbers, prose("6.1 % {cite}`veit2016`.\n\nOurs: 7.2 %."), "7.2"),
    "list beside a citation": (no_typed_numbers, prose("- 6.1 % {cite}`veit2016`\n- ours 7.2 %"), "7.2"),
    "table beside a citation": (no_typed_numbers, prose("| 6.1 {cite}`v` |\n| 7.2 |"), "7.2"),
    "opt-out without a reason": (no_typed_numbers, prose("<!-- number: --> It is 0.12."), "0.12"),
    "large": (small, lambda nb: nb.cells[3].update(source="#" * 1_200_000), "bytes"),
    "papermill metadata": (tidy, lambda nb: nb.metadata.update(papermill={}), "papermill"),
    "cell timing": (tidy, lambda nb: nb.cells[3].metadata.update(execution={}), "execution"),
    "kernel": (tidy, lambda nb: nb.metadata.kernelspec.update(name="venv"), "kernel"),
    "injected": (tidy, lambda nb: nb.cells[3].metadata.update(tags=["injected-parameters"]), "injected"),
    "old Colab cell": (colab_cell, lambda nb: nb.cells[1].update(source="pass"), "make refresh"),
    "no Colab cell": (colab_cell, lambda nb: nb.cells.pop(1), "second cell"),
    "visible Colab cell": (colab_cell, lambda nb: nb.cells[1].metadata.update(tags=["colab"]), "second cell"),
    "no parameters": (has_parameters, lambda nb: nb.cells.pop(3), "0 cells"),
    "parameters twice": (has_parameters, lambda nb: nb.cells.append(nb.cells[3]), "2 cells"),
    "a home folder": (no_machine_paths, output(3, "stream", name="stdout", text="/home/me/x"), "/home"),
    "code that shows": (code_is_the_idea, lambda nb: nb.cells[5].update(source="if N:\n    print(N)"), "2 of 3"),
    "code that draws": (code_is_the_idea, lambda nb: nb.cells[4].metadata.update(tags=[]), "3 of 7"),
    "code that sets up": (code_is_the_idea, lambda nb: nb.cells[6].metadata.update(tags=[]), "3 of 7"),
    "imports twice": (one_setup_cell, lambda nb: nb.cells.append(new_code_cell("from os import path")), "2 cells"),
    "imports in view": (one_setup_cell, lambda nb: nb.cells[6].metadata.update(tags=[]), "full view"),
    "wide code": (narrow, lambda nb: nb.cells[4].update(source="x = " + "1" * 77), "81 columns"),
    "this folder": (no_machine_paths, output(3, "stream", name="stdout", text=f"{ROOT}/x"), str(ROOT)),
}


@pytest.mark.parametrize("case", BAD)
def test_policy_rejects_a_bad_notebook(case):
    policy, spoil, fragment = BAD[case]
    notebook = good()
    spoil(notebook)
    assert any(fragment in complaint for complaint in policy(notebook))


def test_every_policy_has_a_bad_example():
    assert {policy for policy, _, _ in BAD.values()} == set(POLICIES)


def exercises(notebook):
    """For each exercise, whether a folded code cell and then a folded solution follow it."""
    cells, found = notebook.cells, []
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown" and re.search(r"^\*\*\d\.\*\* ", cell.source, flags=re.M):
            after = cells[i + 1 : i + 3]
            folded = len(after) == 2 and {"hide-input", "hide-output"} <= set(book.tags(after[0]))
            found.append(folded and re.search(r"\{+dropdown\}+ Solution", after[1].source) is not None)
    return found


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2].isdigit()], ids=lambda path: path.stem)
def test_a_chapter_has_three_exercises_with_solutions_that_run(path):
    notebook = book.read(path)
    assert exercises(notebook) == [True] * 3
    solution = max(i for i, cell in enumerate(notebook.cells) if re.search(r"dropdown\}+ Solution", cell.source))
    notebook.cells.pop(solution)
    assert exercises(notebook) == [True, True, False]


# -- the book as a whole -------------------------------------------------------------------------------------


def test_toc_and_book_folder_agree():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]
    present = [p.relative_to(ROOT).with_suffix("").as_posix() for p in files(ROOT / "book", {".ipynb", ".md"})]
    assert sorted(listed) == sorted(present)


def test_figure_names_are_unique():
    cells = [cell for path in NOTEBOOKS for cell in code(book.read(path))]
    names = [c.metadata["mystnb"]["figure"]["name"] for c in cells if "figure" in c.metadata.get("mystnb", {})]
    assert sorted(names) == sorted(set(names))


def test_readme_shows_the_first_figure_of_the_index():
    picture = ROOT / "book/images/overview.png"
    assert picture.read_bytes() == book.first_image(book.read(ROOT / "book/index.ipynb"))
    assert "book/images/overview.png" in (ROOT / "README.md").read_text()


def files(folder, kinds):
    """Files of these kinds below a folder, hidden and generated ones left out."""
    hidden = re.compile(r"\.(?!github$)|__pycache__$|.*\.egg-info$")
    found = (p for p in folder.rglob("*") if p.suffix in kinds and p.is_file())
    return [p for p in found if not any(hidden.match(part) for part in p.relative_to(folder).parts)]


def sources():
    """Text files of the repository that people read or run."""
    kinds = {".md", ".ipynb", ".py", ".toml", ".yml", ".yaml", ".cff", ".txt", ".bib", ""}
    places = "book", "lib", "scripts", "tests", "benchmarks", "experiments", "binder", ".github"
    found = [p for name in places for p in files(ROOT / name, kinds)]
    return found + [p for p in ROOT.iterdir() if p.is_file() and p.suffix in kinds and not p.name.startswith(".")]


def test_repository_is_named_as_in_the_configuration():
    url = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    owner, name = url.rsplit("/", 2)[1:]
    other = re.compile(rf"github\.com/(?!{re.escape(owner)}/)[\w.-]+/{re.escape(name)}\b")
    assert [p for p in sources() if other.search(p.read_text())] == []
    python = [p for p in sources() if p.suffix == ".py" and owner in p.read_text()]
    assert python == [], "code takes the address from _config.yml"


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    mentioned = {}
    for path in [p for p in sources() if p.suffix in (".md", ".ipynb")]:
        for target in re.findall(r"(?:`|^|\\n|\")make ([a-z]+)", path.read_text(), flags=re.M):
            mentioned.setdefault(target, path.name)
    assert {t: where for t, where in mentioned.items() if t not in targets} == {}
    assert {"book", "test"} <= set(mentioned)


def test_git_ignores_neither_library_nor_data():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    paths = ["lib/unravelling/chain.py", "data/weights/digits/a.safetensors", "data/results/digits/a.csv",
             "book/index.ipynb", "book/images/overview.png"]
    how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 60}
    assert subprocess.run(["git", "check-ignore", "--no-index", *paths], **how).stdout == ""
    built = subprocess.run(["git", "check-ignore", "_build/html", ".venv"], **how)
    assert built.stdout.split() == ["_build/html", ".venv"]


def test_colab_cell_does_nothing_elsewhere_and_installs_there(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: calls.append((command, kwargs)))
    monkeypatch.setattr(os, "chdir", lambda folder: calls.append(folder))
    monkeypatch.setattr(sys, "path", copy.copy(sys.path))
    exec(book.bootstrap(), {})
    assert calls == []

    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    exec(book.bootstrap(), {})
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    (clone, how), (install, _), folder = calls
    assert clone[:2] == ["git", "clone"]
    assert {repository["url"], repository["branch"], "1"} <= set(clone)
    assert how == {"check": True}
    assert install[1:4] == ["-m", "pip", "install"]
    home = clone[-1]
    assert install[-1].startswith(f"{home}[")
    assert folder == f"{home}/book"
    extras = set(install[-1].split("[")[1].rstrip("]").split(","))
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert extras <= set(re.findall(r"^(\w+) = ", declared, flags=re.M))


WIDGETLESS = """
import sys
from types import SimpleNamespace

import ipykernel.zmqshell
import IPython

IPython.get_ipython = lambda: SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["ipywidgets"] = None
import tqdm.auto
"""


@pytest.mark.parametrize("setup", [True, False])
def test_a_kernel_without_widgets_says_nothing_of_them(setup):
    """Where a notebook has begun as all do; otherwise transformers, for one, has tqdm warn of it."""
    code = book.bootstrap() + WIDGETLESS if setup else WIDGETLESS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ("IProgress not found" in done.stderr) is not setup
