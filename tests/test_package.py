"""The library as others get it: the wheel, what it needs, what an import costs, and its types."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "lib/unravelling"
NEEDED = {"torch", "numpy", "pandas", "scipy", "tqdm", "safetensors"}
WITH_TORCH = {"filelock"}
EXTRAS = {
    "digits": {"scikit-learn"},
    "cifar10": {"torchvision", "pillow"},
    "plots": {"matplotlib", "seaborn"},
    "models": {"torchvision", "timm", "transformers"},
}
IMPORTED_AS = {"scikit-learn": "sklearn", "pillow": "PIL"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without the network from a copy, since setuptools leaves files beside the source."""
    copy = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in ("lib", "tests", "data", "book"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", target, copy], check=True)
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


def test_wheel_holds_the_library_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    assert sorted(names) == sorted(f"unravelling/{p.name}" for p in SOURCE.iterdir() if p.is_file())
    assert "unravelling/py.typed" in names


def test_wheel_requires_what_the_library_runs_on(metadata):
    assert requirements(metadata) == {None: NEEDED, **EXTRAS}
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"


def imports(path):
    """Roots of the modules that a file imports, other than this library's own and the standard library's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"unravelling"}


def test_requirements_are_what_the_source_imports():
    imported = set().union(*(imports(path) for path in SOURCE.glob("*.py")))
    optional = {IMPORTED_AS.get(name, name) for names in EXTRAS.values() for name in names}
    assert imported - optional == NEEDED | WITH_TORCH


def test_import_loads_little_besides_torch(wheel, tmp_path):
    """Counted in modules: SciPy and what draws, trains on other data or brings networks stay out until needed."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys, torch, pandas; before = set(sys.modules); import unravelling; "
        "print(unravelling.__file__); print(*sorted({name.split('.')[0] for name in set(sys.modules) - before})); "
        "print(len(set(sys.modules) - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
                          env=environment)
    where, roots, count = done.stdout.splitlines()
    assert Path(where).parent == tmp_path / "unravelling"
    assert set(roots.split()) - set(sys.stdlib_module_names) <= {"unravelling", "safetensors", "tqdm"}
    assert int(count) < 60


def mypy(*arguments, cwd=ROOT):
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", ROOT / "pyproject.toml"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=cwd)


def test_types_of_the_library_agree():
    done = mypy()
    assert done.stdout + done.stderr == ""


def test_types_reach_those_who_use_the_library(tmp_path):
    (tmp_path / "use.py").write_text(
        "from unravelling import Chain, delete_each, digits, load\n"
        'chain: Chain = load("digits/resnet20-seed0").without(3)\n'
        "delete_each(chain, digits().test)\n"
        'chain.without("3")\n'
        'delete_each("digits/resnet20-seed0", digits().test)\n'
    )
    done = mypy("--cache-dir", ROOT / "_build/mypy", "use.py", cwd=tmp_path)
    assert [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line] == ["4", "5"], done.stdout
