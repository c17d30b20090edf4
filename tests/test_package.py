"""The library as others get it: the wheel in use, what it needs, what an import costs, its types; and its floors."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from email import message_from_bytes
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from test_notebooks import files

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "lib/unravelling"
NEEDED = {"torch", "numpy", "pandas", "scipy", "tqdm", "safetensors"}
EXTRAS = {
    "digits": {"scikit-learn"},
    "cifar10": {"torchvision", "pillow"},
    "plots": {"matplotlib", "seaborn"},
    "models": {"torchvision", "timm", "transformers"},
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without the network from a copy, so that no file is left beside the source."""
    copy = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in ("lib", "tests", "data", "book"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", target, copy], check=True, timeout=600)
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def requirements(metadata):
    """Names of what a wheel requires, by extra; those without one under None."""
    found = {}
    for text in metadata.get_all("Requires-Dist"):
        name = re.match(r"[\w-]+", text)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", text)
        found.setdefault(extra and extra[1], set()).add(name)
    return found


def test_wheel_holds_the_library_and_what_is_stored_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    kept = {path.relative_to(SOURCE.parent).as_posix() for path in files(SOURCE, {".py", ".typed"})}
    data = [path.relative_to(ROOT / "data") for path in files(ROOT / "data", {".csv", ".json", ".safetensors"})]
    data = {f"unravelling/_stored/{path.as_posix()}" for path in data if path.parts[:2] != ("weights", "cifar10")}
    assert set(names) == kept | data
    assert "unravelling/py.typed" in names
    assert {"unravelling/_stored/claims.csv", "unravelling/_stored/weights/digits/resnet110-seed0.safetensors"} <= data


def test_wheel_stays_small(wheel):
    assert wheel.stat().st_size < 15e6


def test_wheel_requires_what_the_library_runs_on(metadata):
    assert requirements(metadata) == {None: NEEDED, **EXTRAS}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(code)` runs code on the wheel alone, away from the source; returns what it prints."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)

    def run(code):
        (folder / "use.py").write_text(code)
        done = subprocess.run([sys.executable, "use.py"], capture_output=True, text=True, check=False, cwd=folder,
                              env={**os.environ, "PYTHONPATH": str(folder)}, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


def test_wheel_works_as_the_readme_uses_it(installed):
    printed = installed("""if True:
        import torch, unravelling
        from torch import nn
        from unravelling import delete_each, digits, load, unravel

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.f = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

            def forward(self, x):
                return x + self.f(x)

        own = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), Block(), Block(), nn.Flatten(), nn.Linear(256, 10)).eval()
        images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        chain = unravel(own, images)
        chain.verify(images)
        print(unravelling.__file__, len(chain.units))
        table = delete_each(load("digits/resnet20-seed0"), digits().test)
        print(*table.unit)
    """)
    where, deleted = printed.splitlines()
    assert where.split() == [str(installed.folder / "unravelling/__init__.py"), "2"]
    assert deleted.split() == [str(unit) for unit in range(9)]


def python_of(text):
    """The first block of Python in a section of Markdown."""
    return re.search(r"```python\n(.*?)```", text, flags=re.S)[1]


@pytest.fixture(scope="module")
def outside(wheel, tmp_path_factory):
    """The interpreter of an environment that has the wheel and no clone, and where the library lies in it."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=120)
    python = next(path for path in (home / "bin/python", home / "Scripts/python.exe") if path.exists())
    target = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                                 capture_output=True, text=True, check=True, timeout=60).stdout.strip())
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target,
                    wheel], check=True, timeout=120)
    # what it needs comes from the environment of the tests, whose own editable install is not followed from here
    (target / "outer.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python, target / "unravelling"


@pytest.fixture(scope="module")
def elsewhere(outside, tmp_path_factory):
    """`elsewhere(*arguments)` runs Python in an empty folder, in an environment that has the wheel and no clone."""
    (python, library), folder = outside, tmp_path_factory.mktemp("elsewhere")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=folder, capture_output=True, text=True, check=False,
                              env={**clean, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}, timeout=300)
        return done.returncode, done.stdout + done.stderr

    run.folder, run.home = folder, library
    return run


def test_three_lines_of_the_readme_work_outside_a_clone(elsewhere):
    readme = (ROOT / "README.md").read_text()
    lines = python_of(readme[readme.index("## The library in three lines"):])
    assert 'load("digits/resnet110-seed0")' in lines
    code, printed = elsewhere("-c", f"{lines}\nimport unravelling; print(unravelling.__file__)")
    assert code == 0, printed
    assert "delta_error" in printed
    assert Path(printed.split()[-1]) == elsewhere.home / "__init__.py"


def test_results_claims_and_weights_come_with_the_library(elsewhere):
    """Every table as it lies in the repository; networks that do not come along are named as missing."""
    code, printed = elsewhere("-c", """if True:
        import json
        from unravelling import load
        from unravelling.stored import data_folder, stored
        folder = data_folder()
        tables = sorted(p.relative_to(folder / "results").with_suffix("") for p in folder.glob("results/*/*.csv"))
        rows = {name.as_posix(): len(stored(name.as_posix(), recipe=None)) for name in tables}
        print(json.dumps([rows, (folder / "claims.csv").is_file()]))
        load("cifar10/resnet20-seed0")
    """)
    assert code == 1, printed
    rows, claims = json.loads(printed.splitlines()[0])
    assert rows == {path.relative_to(ROOT / "data/results").with_suffix("").as_posix(): len(pd.read_csv(path))
                    for path in ROOT.glob("data/results/*/*.csv")}
    assert claims
    assert "no weights named 'cifar10/resnet20-seed0': there are digits/plain20-seed0, digits/resnet110" in printed


def test_a_chapter_alone_runs_with_the_library_installed(elsewhere):
    """It loads a network and stored tables of both data sets; nothing is fetched."""
    shutil.copy(ROOT / "book/08-short-paths.ipynb", elsewhere.folder)
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(failing, elsewhere.folder / "failing.ipynb")
    assert elsewhere("-m", "IPython", "--no-banner", "failing.ipynb")[0], "a notebook that fails is noticed"
    code, printed = elsewhere("-m", "IPython", "--no-banner", "--colors=NoColor", "08-short-paths.ipynb")
    assert code == 0, printed[-2000:]
    assert "Error" not in printed


def test_import_loads_little_besides_torch(installed):
    """Counted in modules: SciPy and what draws, trains on other data or brings networks stay out until needed."""
    printed = installed(
        "import sys, torch, pandas; before = set(sys.modules); import unravelling; "
        "print(unravelling.__file__); print(*sorted({name.split('.')[0] for name in set(sys.modules) - before})); "
        "print(len(set(sys.modules) - before))"
    )
    where, roots, count = printed.splitlines()
    assert Path(where).parent == installed.folder / "unravelling"
    assert set(roots.split()) - set(sys.stdlib_module_names) <= {"unravelling", "safetensors", "tqdm"}
    assert int(count) < 60


# -- requirements --------------------------------------------------------------------------------------------


def imports(source):
    """Roots of the modules that code imports, other than this library's own and the standard library's."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"unravelling"}


def distributions(modules):
    """Names under which modules are installed."""
    return {packages_distributions().get(module, [module])[0].lower().replace("_", "-") for module in modules}


def ranges(path):
    """Names and ranges of a requirements file, without installs from a folder and from other files."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [re.match(r"([\w-]+)\s*(.*)", line).groups() for line in lines if line and not line.startswith("-")]


def declared():
    """Names and ranges in pyproject.toml's lists of dependencies, read as text: Python 3.10 has no tomllib."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = text[text.index("\ndependencies = ["):text.index("\n[tool.")]
    return [re.match(r"([\w-]+)(.*)", entry).groups() for entry in re.findall(r'"(.*?)"', lists)]


def test_requirements_are_what_the_source_imports():
    imported = set().union(*(imports(path.read_text()) for path in SOURCE.rglob("*.py")))
    optional = {name for names in EXTRAS.values() for name in names}
    assert distributions(imported) - optional == NEEDED


@pytest.mark.parametrize("folder", ["book", "scripts", "tests", "benchmarks", "experiments"])
def test_whatever_is_imported_is_declared(folder):
    names = {name for name, _ in [*declared(), *ranges(ROOT / "requirements.txt")]}
    if folder in {"experiments", "tests"}:
        names |= {name for name, _ in ranges(ROOT / "experiments/requirements.txt")}
    if folder == "benchmarks":
        names |= {name for name, _ in ranges(ROOT / "benchmarks/requirements.txt")}
    own = {path.stem for path in (ROOT / folder).glob("*.py")} | {path.stem for path in ROOT.glob("experiments/*.py")}
    own |= {path.stem for path in ROOT.glob("book/*.py")}
    sources = [path.read_text() for path in (ROOT / folder).rglob("*.py")]
    for path in (ROOT / folder).glob("*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        sources += [cell.source for cell in cells if cell.cell_type == "code"]
    assert sources
    assert distributions(set().union(*map(imports, sources)) - own) - names == set()


def test_each_range_is_written_once():
    files = [path for path in ROOT.glob("*/requirements.txt") if not path.parent.name.startswith((".", "_"))]
    written = [*declared(), *(pair for path in [ROOT / "requirements.txt", *files] for pair in ranges(path))]
    environment = yaml.safe_load((ROOT / "binder/environment.yml").read_text())["dependencies"]
    written += [re.match(r"([\w-]+)(.*)", entry).groups() for entry in environment if not entry.startswith("python=")]
    assert {name for name, count in Counter(name for name, range_ in written if range_).items() if count > 1} == set()
    assert dict(declared())["torch"].startswith(">=2.8")
    extras = set(re.findall(r"^(\w+) = ", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1]
                            .split("\n[")[0], flags=re.M))
    for path in (ROOT / "requirements.txt", ROOT / "binder/postBuild"):
        assert set(re.search(r"\.\[(.*?)\]", path.read_text())[1].split(",")) == extras


def test_what_is_locked_fits_the_ranges_and_has_hashes():
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text().strip())
    locked = {}
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), f"{entry.splitlines()[0]} has no hash"
        name, version = re.match(r"([\w.-]+)==([^ ;\\]+)", entry).groups()
        locked.setdefault(name.lower().replace("_", "-"), []).append(version)
    wanted = [*declared(), *ranges(ROOT / "requirements.txt"), *ranges(ROOT / "experiments/requirements.txt")]
    assert len(wanted) > 30
    for name, range_ in wanted:
        versions = locked.get(name.lower(), [])
        assert versions, f"{name} is not locked: make lock"
        assert all(SpecifierSet(range_.strip()).contains(version) for version in versions), f"{name}: make lock"


def test_continuous_integration_runs_what_is_pinned():
    workflows = [path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")]
    used = [line for text in workflows for line in re.findall(r"uses:\s*(\S+)", text)]
    assert len(used) >= 5
    assert [action for action in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action)] == []
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test LOCKED=1")
    words = ["make", "--dry-run", "--always-make", ".venv/.experiments", "LOCKED=1", "PYTHON=true"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    installs = re.findall(r"pip install .*", done.stdout)
    assert len(installs) == 3
    assert all("--require-hashes --requirement requirements.lock" in line or "--no-deps" in line for line in installs)


def test_whatever_starts_a_process_has_a_timeout():
    for path in (ROOT / "tests").glob("test_*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call):
                name, given = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
                if re.fullmatch(r"subprocess\.(run|call|check_\w+)|.*\.(communicate|wait)", name):
                    limited = given & {"timeout", None} or (call.args and name.endswith(".wait"))
                    assert limited, f"{path.name}, line {call.lineno} may wait for ever"


# -- floors --------------------------------------------------------------------------------------------------

FLOORS = [
    ["chain"],
    ["data", "stats"],
    ["batches", "nets", "stored"],
    ["paths", "lesion", "train", "weights", "wording"],
    ["ensemble", "plots", "tracing.trace"],
    ["tracing.reading"],
    ["tracing.parts"],
    ["tracing"],
    ["verify"],
    ["from_model"],
    [""],
]
"""The library's modules, by floor; a module imports from lower floors alone. "" is the package itself."""


def modules(root):
    """Sources of a package's modules, by name below it."""
    names = {path: path.relative_to(root).with_suffix("").as_posix().replace("/", ".") for path in root.rglob("*.py")}
    return {re.sub(r"\.?__init__$", "", name): path.read_text() for path, name in names.items()}


def imported_modules(name, sources, package):
    """Which of a package's modules one of them imports, at any place in its code."""
    found, here = set(), name.split(".") if name else []
    if not any(other.startswith(f"{name}.") for other in sources) and name:
        here = here[:-1]  # relative imports start from the folder
    for node in ast.walk(ast.parse(sources[name])):
        places = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[:len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
            places = [[*base, alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == package:
            places = [[*node.module.split(".")[1:], alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            places = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == package]
        for place in places:
            found.add(".".join(place) if ".".join(place) in sources else ".".join(place[:-1]))
    return found


def upward(sources, floors, package="unravelling"):
    """Imports that do not go down, and modules without a floor."""
    number = {name: floor for floor, names in enumerate(floors) for name in names}
    missing = [f"{name} has no floor" for name in sources if name not in number]
    pairs = [(name, other) for name in sources for other in imported_modules(name, sources, package)]
    return missing + [f"{one} imports {other}" for one, other in pairs
                      if one in number and other in number and number[one] <= number[other]]


def circles(sources, package="unravelling"):
    """Modules that import one another, or nothing."""
    try:
        graph = {name: imported_modules(name, sources, package) for name in sources}
        return [*TopologicalSorter(graph).static_order()] and []
    except CycleError as error:
        return error.args[1]


def test_library_has_no_circle_and_imports_go_down():
    sources = modules(SOURCE)
    assert circles(sources) == []
    assert upward(sources, FLOORS) == []
    assert sum(len(source.splitlines()) for source in sources.values()) <= 5840


@pytest.mark.parametrize(("source", "circle", "complaints"), [
    ("from .b import f", ["a", "b"], ["a imports b"]),
    ("def f():\n    from . import b", ["a", "b"], ["a imports b"]),
    ("import p.b", ["a", "b"], ["a imports b"]),
    ("from p.sub.c import f", ["a", "b", "sub.c"], ["a imports sub.c"]),
    ("from . import f", [], ["a imports "]),
    ("import torch", [], []),
])
def test_circles_and_upward_imports_are_found(source, circle, complaints):
    sources = {"": "", "a": source, "b": "from .a import f", "sub": "from .c import f", "sub.c": "from ..b import f"}
    assert sorted(set(circles(sources, "p"))) == circle
    assert upward(sources, [["a"], ["b"], ["sub.c"], ["sub"], [""]], "p") == complaints
    assert upward({**sources, "d": ""}, [["a"], ["b"], ["sub.c"], ["sub"], [""]], "p")[0] == "d has no floor"


# -- types ---------------------------------------------------------------------------------------------------


def mypy(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", ROOT / "pyproject.toml"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=cwd, timeout=900)


def test_types_of_the_library_agree():
    done = mypy()
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("installed_as", ["wheel", "editable"])  # as `make` installs it for these tests
def test_types_reach_those_who_use_the_library(installed_as, outside, tmp_path):
    (tmp_path / "use.py").write_text(
        "from unravelling import Chain, delete_each, digits, load\n"
        'chain: Chain = load("digits/resnet20-seed0").without(3)\n'
        "delete_each(chain, digits().test)\n"
        'chain.without("3")\n'
        'delete_each("digits/resnet20-seed0", digits().test)\n'
    )
    python = {"wheel": outside[0], "editable": sys.executable}[installed_as]
    done = mypy("--python-executable", python, "use.py", cwd=tmp_path)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line] == ["4", "5"], done.stdout
