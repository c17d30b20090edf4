"""The library reference and the recipes against the library: every public name once, links that lead somewhere."""

import importlib
import inspect
import io
import pkgutil
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import unravelling
import yaml
from sphinx.application import Sphinx
from sphinx.util import console

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "book/reference.md"
MODULES = {
    info.name: importlib.import_module(info.name)
    for info in pkgutil.walk_packages(unravelling.__path__, "unravelling.")
    if not info.name.rpartition(".")[2].startswith("_")
}
RECIPES = nbformat.read(ROOT / "book/recipes.ipynb", as_version=4)


def public():
    """Full names of the functions and classes that the modules define, underscores left out."""
    return {
        f"{module.__name__}.{name}"
        for module in MODULES.values()
        for name, thing in vars(module).items()
        if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and not name.startswith("_")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """What Sphinx documents on the page, by full name, and its complaints; the book's settings, without its theme."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    (source / "index.md").write_text(PAGE.read_text() + "\n```{toctree}\nrecipes\n```\n")
    (source / "recipes.md").write_text("# Recipes\n")
    shutil.copy(ROOT / "book/architectures.csv", source)
    (source / "conf.py").write_text("")
    config = yaml.safe_load((ROOT / "_config.yml").read_text())["sphinx"]["config"]
    own = {key: config[key] for key in config if re.match("autodoc|napoleon|nitpick|default_role|maximum_sig", key)}
    own |= {"extensions": ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"], "nitpicky": True}
    warnings = io.StringIO()
    console.nocolor()
    app = Sphinx(source, source, out, out, "dummy", own, status=None, warning=warnings)
    app.build()
    return app.env.get_domain("py").objects, warnings.getvalue()


def test_page_is_made_without_a_warning(built):
    assert built[1].splitlines() == []


def test_every_public_function_and_class_is_documented_once(built):
    """Once, for Sphinx warns of what it finds twice."""
    documented = {name for name, entry in built[0].items() if entry.objtype in {"function", "class", "exception"}}
    assert documented == public()
    assert set(MODULES) == {name for name, entry in built[0].items() if entry.objtype == "module"}


def test_every_name_of_the_package_is_in_the_table_and_leads_to_its_entry(built):
    linked = re.findall(r"`~(unravelling\.\w+\.(\w+))`", PAGE.read_text().split("\n| To |")[1].split("\n\n")[0])
    assert sorted(name for _, name in linked) == sorted(unravelling.__all__)
    assert {full for full, _ in linked} <= set(built[0])
    for full, name in linked:
        module = MODULES[full.rpartition(".")[0]]
        assert getattr(module, name) is getattr(unravelling, name)


def test_arguments_are_documented_as_they_are_called():
    """Every name under Args is an argument, or the attribute of a class."""
    wrong = []
    for full in public():
        module, _, name = full.rpartition(".")
        thing = getattr(MODULES[module], name)
        described = re.search(r"\n    Args:\n((?:        .*\n|\n)+)", inspect.getdoc(thing).replace("\n", "\n    "))
        names = re.findall(r"^ {8}(\w+):", described[1], flags=re.M) if described else []
        arguments = set(inspect.signature(thing).parameters) if names else set()
        wrong += [f"{full}: {name}" for name in names if name not in arguments]
    assert wrong == []


# -- recipes -------------------------------------------------------------------------------------------------


def recipes():
    """Heading and code cells of every recipe."""
    found = []
    for cell in RECIPES.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            found.append((cell.source.splitlines()[0][3:], []))
        elif cell.cell_type == "code" and found:
            found[-1][1].append(cell)
    return found


def test_there_are_ten_recipes_each_answers_a_question_in_ten_lines():
    headings = [heading for heading, _ in recipes()]
    assert len(set(headings)) == len(headings) >= 10
    for heading, cells in recipes():
        assert re.fullmatch(r"How do I .*\?", heading)
        answers = [cell for cell in cells if "hide-input" not in cell.metadata.get("tags", [])]  # the rest prepares it
        assert len(answers) == 1, heading
        assert len(re.findall(r"^.*\S", answers[0].source, flags=re.M)) <= 10, heading
        assert answers[0].outputs, heading


def test_recipes_use_no_private_name():
    code = "\n".join(cell.source for _, cells in recipes() for cell in cells)
    assert re.findall(r"\b_[a-z]\w*", code) == []
    assert re.findall(r"\.\w*_\b(?=\()", code.replace(".__init__(", "")) == [], "recipes change nothing in place"
