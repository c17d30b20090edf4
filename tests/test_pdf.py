"""The book as one PDF, printed from a book of three pages. Skipped where no Chromium is installed."""

import functools
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
from conftest import CHROMIUM
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pypdf import PdfReader
from test_notebooks import ROOT

PIXEL = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg==")
LONG = "wide = [" + ", ".join(f"'word{i}'" for i in range(60)) + "]"
FIGURE = {"figure": {"caption": "A dot.", "name": "fig-dot"}, "image": {"alt": "A dot."}}


def notebook(path, *cells):
    setup = new_code_cell("pass", metadata={"tags": ["remove-cell", "colab"]})
    nbformat.write(new_notebook(cells=[cells[0], setup, *cells[1:]]), path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pages of a small book, and what is in the PDF that is printed from them."""
    if not CHROMIUM:
        pytest.skip("needs chromium")
    root = tmp_path_factory.mktemp("book")
    for folder in ("scripts", "book/_static"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "_config.yml").write_text((ROOT / "_config.yml").read_text())
    (root / "book/references.bib").write_text("")
    (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\nparts:\n  - caption: Both\n    numbered: true\n"
                                   "    chapters:\n      - file: book/01-one\n      - file: book/02-two\n")
    (root / "book/index.md").write_text("# A small book\n\nIt begins with {doc}`01-one`, and <https://example.org/>.\n")
    notebook(root / "book/01-one.ipynb",
             new_markdown_cell("# The first chapter\n\n## Summary\n\nSee {numref}`fig-dot` and {eq}`eq-sum`."),
             new_code_cell("secret = 'folded away'", metadata={"tags": ["hide-input"]}),
             new_code_cell(LONG),
             new_code_cell("count()", metadata={"tags": ["remove-input", "hide-output"]}, execution_count=1,
                           outputs=[new_output("stream", name="stdout", text="Seven pears.")]),
             new_markdown_cell("```{dropdown} Solution\nForty-two apples.\n```"))
    notebook(root / "book/02-two.ipynb",
             new_markdown_cell("# The second chapter\n\n## Summary\n\nAs in {doc}`01-one`.\n\n"
                               "$$\n1 + 1 = 2\n$$ (eq-sum)"),
             new_code_cell("dot()", metadata={"mystnb": FIGURE}, execution_count=1,
                           outputs=[new_output("display_data", {"image/png": PIXEL, "text/plain": "dot"})]))
    run = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    for arguments in (["book.py", "pages", "book", "_build/pages"], ["pdf.py", "_build/pages", "_build/book.pdf"]):
        done = run([sys.executable, f"scripts/{arguments[0]}", *arguments[1:]])
        assert done.returncode == 0, done.stderr
    reader = PdfReader(root / "_build/book.pdf")
    return SimpleNamespace(root=root, run=run, reader=reader, texts=[page.extract_text() for page in reader.pages])


def links(made, page):
    """Where the links of a page lead: numbers of pages, from 0, or addresses."""
    found = []
    for note in made.reader.pages[page].get("/Annots") or []:
        link = note.get_object()
        if target := link.get("/Dest"):
            where = made.reader.named_destinations[target]
            found.append(made.reader.get_destination_page_number(where))
        elif link.get("/Subtype") == "/Link":
            found.append(link["/A"]["/URI"])
    return found


def test_every_page_begins_a_sheet_behind_cover_and_contents(made):
    cover, contents, index, first, second = made.texts
    assert "A small book" in cover
    assert "By the" in cover
    assert "CC BY 4.0" in cover
    assert "Contents" in contents
    for text, title in ((index, "A small book"), (first, "1. The first chapter"), (second, "2. The second chapter")):
        assert title in " ".join(text.split())[:30]
    assert [text.split()[0] for text in made.texts] == ["A", "2", "3", "4", "5"], "all but the cover have a number"


def test_contents_give_the_number_of_the_page_to_which_they_lead(made):
    assert links(made, 1) == [2, 3, 4]
    lines = " ".join(made.texts[1].split())
    assert re.search(r"first chapter\s*4.*second chapter\s*5", lines)


def test_links_between_pages_lead_within_the_document(made):
    assert links(made, 2) == [3, "https://example.org/"]
    assert links(made, 3) == [4, 4]
    assert links(made, 4) == [3]
    assert "Fig. 2.1" in made.texts[3]


def test_outline_names_each_heading_once(made):
    def titles(entries):
        return [titles(entry) if isinstance(entry, list) else entry.title for entry in entries]

    assert [title for title in titles(made.reader.outline) if isinstance(title, str)] == [
        "Contents", "A small book", "1. The first chapter", "2. The second chapter"]
    assert titles(made.reader.outline)[-1] == ["2.1. Summary"]


def test_figures_are_in_and_solutions_open_and_folded_code_and_buttons_away(made):
    assert len(made.reader.pages[4].images) == 1
    assert "A dot." in made.texts[4]
    assert "Forty-two apples." in made.texts[3]
    assert "Seven pears." in made.texts[3], "results that the page folds are open, too"
    assert "folded away" not in "".join(made.texts)
    assert "Show code" not in "".join(made.texts)


def test_long_lines_of_code_wrap(made):
    assert [word for word in re.findall(r"word\d+", LONG) if word not in made.texts[3]] == []
    page, starts = made.reader.pages[3], []  # of runs of text, of which every token is one

    def note(text, current, matrix, font, size):
        starts.append(current[0] * matrix[4] + current[4])

    page.extract_text(visitor_text=note)
    assert len(starts) > 60
    assert max(starts) < page.mediabox.width - 40


def test_missing_pages_and_a_missing_browser_are_named(made, monkeypatch):
    done = made.run([sys.executable, "scripts/pdf.py", "_build", "_build/other.pdf"])
    assert done.returncode
    assert "_build holds no pages of the book" in done.stderr
    monkeypatch.setenv("PATH", str(made.root))
    done = made.run([sys.executable, "scripts/pdf.py", "_build/pages", "_build/other.pdf"])
    assert done.returncode
    assert "neither is on the PATH" in done.stderr
    assert [path.name for path in (made.root / "_build").glob("*.pdf")] == ["book.pdf"]
    assert not list((made.root / "_build").glob("pdf-*"))
