"""The plain editions: no MyST is left in them, and a chapter alone in a folder runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_notebooks import ROOT, book, files

_spec = importlib.util.spec_from_file_location("plain", ROOT / "scripts/plain.py")
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)

EDITIONS = sorted(ROOT.glob("_build/plain/book/*.ipynb"))
built = pytest.mark.skipif(not EDITIONS, reason="no plain editions are built; `make pages` builds them")
REFERENCES = {
    "cite": {"a": ["A, 2016", "u/a"], "b": ["B et al., 2017", "u/b"]},
    "doc": {"index": ["The book", "s/index.html"], "05-x": ["Deleting", "s/05-x.html"]},
    "eq": {"eq-1": ["(2.1)", "s/e1"]},
    "numref": {"fig-a": ["Figure 5.1", "s/fa"]},
    "term": {"residual block": ["residual block", "s/t"]},
    "py": {"load": ["`load`", "s/l"]},
}


@pytest.mark.parametrize(("myst", "expected"), [
    ("as in {cite}`a` and {cite}`a,b`", "as in ([A, 2016](u/a)) and ([A, 2016](u/a); [B et al., 2017](u/b))"),
    ("{cite:t}`b` say", "[B et al., 2017](u/b) say"),
    ("see {doc}`05-x`, {doc}`that one <05-x>`", "see [Deleting](s/05-x.html), [that one](s/05-x.html)"),
    ("[there](05-x.ipynb), [here](http://x)", "[there](s/05-x.html), [here](http://x)"),
    ("[](05-x), [](05-x.md) and [a](b.md)", "[Deleting](s/05-x.html), [Deleting](s/05-x.html) and [a](b.md)"),
    ("equation {eq}`eq-1` in {numref}`fig-a`", "equation [(2.1)](s/e1) in [Figure 5.1](s/fa)"),
    ("a {term}`Residual block`, {term}`blocks <residual block>`", "a [Residual block](s/t), [blocks](s/t)"),
    ("{py:func}`load` and {py:func}`~load`", "[`load`](s/l) and [`load`](s/l)"),
    ("$$\ny = x\n$$ (eq-1)", "$$\ny = x \\tag{2.1}\n$$"),
    ("(label)=\n# Title <!-- number: limit -->", "# Title"),
    ("Term\n: Its meaning.\n\nNext\n: More", "**Term:** Its meaning.\n\n**Next:** More"),
    ("```{note}\nA {eq}`eq-1`.\n\n$$\na\n$$\n```\nthen", "> **Note**\n>\n> A [(2.1)](s/e1).\n>\n> $$ a $$\nthen"),
    (":::{admonition} Why\n:class: tip\nB\n:::", "> **Why**\n>\n> B"),
    ("````{dropdown} Solution\n```python\nf\n```\n````",
     "<details>\n<summary>Solution</summary>\n\n```python\nf\n```\n\n</details>"),
    ("```python\nx = '{cite}`a`'\n```", "```python\nx = '{cite}`a`'\n```"),
])
def test_myst_becomes_markdown(myst, expected):
    assert plain.text(myst, REFERENCES) == expected


@pytest.mark.parametrize(("myst", "fragment"), [
    ("```{figure} a.png\n```", "directive figure"), ("{cite}`nobody`", "nobody"), ("{abbr}`x`", "abbr"),
    ("[](nowhere)", "nowhere"),
])
def test_what_has_no_plain_form_is_refused(myst, fragment):
    with pytest.raises(plain.NotPlain, match=fragment):
        plain.plain(new_notebook(cells=[new_markdown_cell(myst)]), REFERENCES, "")


def test_a_figure_that_was_not_drawn_is_refused():
    cell = new_code_cell("plot()", metadata={"mystnb": {"figure": {"name": "fig-b", "caption": "B"}}})
    with pytest.raises(plain.NotPlain, match="fig-b"):
        plain.plain(new_notebook(cells=[cell]), REFERENCES, "")


def test_strings_of_code_become_plain_and_the_code_still_runs(capsys):
    source = ('n, figure, page = 2, "fig-a", "05-x"\n'
              'print(f"{n} {{cite}}`a` {{numref}}`{figure}` [to]({page})" + " {eq}`eq-1`")')
    exec(plain.program(source, REFERENCES), {})
    assert capsys.readouterr().out == "2 ([A, 2016](u/a)) [Figure 5.1](s/fa) [to](s/05-x.html) [(2.1)](s/e1)\n"
    source = 'n = 3\nprint(f"""\n```{{dropdown}} Solution\n{n}\n```\n""")'
    exec(plain.program(source, REFERENCES), {})
    assert capsys.readouterr().out.split() == ["<details>", "<summary>Solution</summary>", "3", "</details>"]


def test_cells_are_folded_captioned_and_set_up():
    figure = {"figure": {"name": "fig-a", "caption": "Error {cite}`a`."}}
    notebook = new_notebook(cells=[
        new_code_cell("old", metadata={"tags": ["colab", "remove-cell"]}),
        new_code_cell("N = 1", metadata={"tags": ["parameters"]}),
        new_code_cell("plot()", metadata={"tags": ["hide-input"], "mystnb": figure}),
        new_code_cell("p", metadata={"tags": ["hide-output"]},
                      outputs=[new_output("display_data", {"text/markdown": "{eq}`eq-1`"})])])
    before = json.dumps(notebook)
    setup, parameters, hidden, caption, last = plain.plain(notebook, REFERENCES, "new").cells
    assert json.dumps(notebook) == before, "the source is left alone"
    assert (setup.source, dict(setup.metadata)) == ("new", {})
    assert parameters.metadata == {"tags": ["parameters"]}
    assert hidden.metadata == {"cellView": "form", "jupyter": {"source_hidden": True}}
    assert caption.source == "**Figure 5.1.** Error ([A, 2016](u/a))."
    assert last.metadata == {"jupyter": {"outputs_hidden": True}}
    assert last.outputs[0].data["text/markdown"] == "[(2.1)](s/e1)"


@built
def test_every_notebook_has_an_edition_without_myst():
    assert [path.name for path in EDITIONS] == sorted(path.name for path in ROOT.glob("book/*.ipynb"))
    for path in EDITIONS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        assert notebook.cells[1].source == book.bootstrap(book.beside(notebook))
        code = "\n".join(cell.source for cell in notebook.cells)
        beside = re.findall(r"^(?:import|from) (interactive|judging)\b", code, flags=re.M)  # where one lies, both do
        assert re.findall(r'find_spec\("(interactive|judging)"\)', notebook.cells[1].source) == beside[:1]
        texts = [cell.source for cell in notebook.cells]
        texts += ["".join(o.get("data", {}).get("text/markdown", "")) for c in book.code(notebook) for o in c.outputs]
        assert [text for text in texts if plain.ROLE.search(text) or plain.LEFT.search(text)] == [], path.name


@built
def test_editions_lie_in_a_copy_of_what_they_need():
    """What Binder gets: the library, the data, the modules and figures' scripts beside the notebooks."""
    for name in ("lib", "data", "experiments"):
        wanted = files(ROOT / name, {".py", ".csv", ".json", ".safetensors", ".yaml"})
        assert wanted
        assert [p for p in wanted if not (ROOT / "_build/plain" / p.relative_to(ROOT)).is_file()] == []
    there = ("pyproject.toml", "README.md", "LICENSE", "binder/postBuild", "book/interactive.py", "book/judging.py",
             "book/_static/interactive.js", "book/_static/interactive.css")
    assert [name for name in there if not (ROOT / "_build/plain" / name).is_file()] == []


@built
def test_buttons_of_a_page_lead_to_the_plain_edition():
    newest = max((p for p in (ROOT / "_build/html", ROOT / "_build/committed") if p.exists()),
                 key=lambda p: (p / "index.html").stat().st_mtime)
    for path in EDITIONS:
        page = (newest / f"book/{path.stem}.html").read_text()
        assert f"/plain?urlpath=lab/tree/book/{path.name}" in page
        assert f"/blob/plain/book/{path.name}" in page
        assert (newest / "_sources/book" / path.name).read_text() == path.read_text()


# -- alone -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """An empty folder on a pretended Colab, whose git clones this working copy and whose pip notes its arguments."""
    tools, folder = tmp_path / "tools", tmp_path / "content"
    (tools / "pip").mkdir(parents=True)
    folder.mkdir()
    (tools / "sitecustomize.py").write_text(
        "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n")
    (tools / "pip/__init__.py").write_text("")
    (tools / "pip/__main__.py").write_text(
        f"import pathlib, sys\npathlib.Path({str(tmp_path / 'installed')!r}).write_text(' '.join(sys.argv[1:]))\n")
    copied = " ".join(f"'{ROOT / name}'" for name in ("lib", "data", "pyproject.toml"))
    (tools / "git").write_text(f'#!/bin/sh\nfor home; do :; done\nmkdir -p "$home/book"\ncp -r {copied} "$home"\n'
                               f'cp -r "{ROOT}"/book/*.py "{ROOT}/book/_static" "$home/book"\n')
    (tools / "git").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tools))
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return folder


@built
@pytest.mark.parametrize("name", ["01-residual-connections", "06-reordering"])
def test_a_chapter_alone_on_colab_runs(colab, name):
    notebook = nbformat.read(ROOT / f"_build/plain/book/{name}.ipynb", as_version=4)
    for cell in book.code(notebook):
        cell.outputs = []
    notebook.cells.append(new_code_cell("import unravelling; print(unravelling.__file__)"))
    done = papermill.execute_notebook(notebook, None, kernel_name="python3", language="python", cwd=colab,
                                      progress_bar=False, execution_timeout=300)
    home = colab / yaml_name()
    assert Path(done.cells[-1].outputs[0].text.strip()) == home / "lib/unravelling/__init__.py"
    assert f"--editable {home}[" in (colab.parent / "installed").read_text()
    shown = ["".join(o.get("data", {}).get("text/markdown", "")) for c in book.code(done) for o in c.outputs]
    assert any(shown)
    assert not [text for text in shown if plain.ROLE.search(text) or plain.LEFT.search(text)]


def yaml_name():
    """The last part of the repository's address."""
    return book.settings()["repository"]["url"].rstrip("/").rsplit("/", 1)[-1]


def test_without_network_or_library_the_first_cell_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="library is not installed: set INSTALL = True"):
        exec(book.bootstrap(), {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "unravelling" or None)
    exec(book.bootstrap(), {})
    with pytest.raises(ModuleNotFoundError, match=r"or interactive\.py does not lie beside .*: set INSTALL = True"):
        exec(book.bootstrap("interactive"), {})

    def fails(command, **how):
        raise subprocess.CalledProcessError(128, command)

    monkeypatch.setattr(subprocess, "run", fails)
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"needs git and the network, once: https://\S+ could not be fetched"):
        exec(book.bootstrap(), {})


def test_figures_are_drawn_anew_for_slides_with_their_captions_beside_them(tmp_path):
    draw = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('a line');"
    below = [new_markdown_cell(f"**Figure 5.{number}.** A *line*.") for number in (1, 2, 3)]
    cells = [new_code_cell(draw), below[0], below[1], new_code_cell("print(1)"), below[2]]
    nbformat.write(new_notebook(cells=cells), tmp_path / "05-lines.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), tmp_path / "06-none.ipynb")
    run = [sys.executable, ROOT / "scripts/figures.py", tmp_path / "figures"]
    done = subprocess.run([*run, tmp_path / "05-lines.ipynb"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = {path.name: path for path in (tmp_path / "figures").iterdir()}
    assert sorted(written) == ["figure-5.1.pdf", "figure-5.1.svg", "figure-5.1.txt"]
    assert ElementTree.parse(written["figure-5.1.svg"]).getroot().tag.endswith("}svg")
    assert written["figure-5.1.pdf"].read_bytes().startswith(b"%PDF-")
    assert written["figure-5.1.txt"].read_text() == "Figure 5.1. A *line*.\n"
    failed = subprocess.run([*run, tmp_path / "06-none.ipynb"], capture_output=True, text=True, timeout=300)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "error: 06-none.ipynb: ZeroDivisionError: division by zero"
