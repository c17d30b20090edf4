"""The builder, on a project of two pages: what runs again, what a failure leaves, and the environment of `make`."""

import contextlib
import copy
import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_notebooks import NOTEBOOKS, ROOT, book, colab_cell, executed_in_order, good, nothing_vacuous, tidy


def small_notebook(path, title, *cells):
    parts = [new_markdown_cell(f"# {title}"), new_code_cell("pass", metadata={"tags": ["remove-cell", "colab"]})]
    for cell in cells:
        parts.append(new_code_cell(cell) if isinstance(cell, str) else cell)
    nbformat.write(new_notebook(cells=parts), path)


def parameters(source):
    return new_code_cell(source, metadata={"tags": ["parameters"]})


def makefile_in(folder, *always):
    """`make(…)` in a folder that gets the project's Makefile, whatever make and options run these tests."""
    for name in ("Makefile", "requirements.txt", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    def make(*arguments, start=subprocess.run, **how):
        clean = {name: value for name, value in os.environ.items() if not re.match("M.*FLAGS|MAKE", name)}
        how = how or {"capture_output": True, "text": True, "timeout": 300}
        return start(["make", "--no-print-directory", *always, *arguments], cwd=folder, env=clean, **how)

    return make


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the pipeline with a book of one notebook; `.run(…)` executes that one."""
    for folder in ("lib/unravelling", "data"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("scripts", "book/_static"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "_config.yml", tmp_path)
    (tmp_path / "book/references.bib").write_text("")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\nchapters:\n  - file: book/01-one\n")
    (tmp_path / "lib/unravelling/__init__.py").write_text("")
    (tmp_path / "book/index.md").write_text("# Index\n")
    small_notebook(tmp_path / "book/01-one.ipynb", "One", parameters("N = 3"), "print('N is', N)")

    monkeypatch.delenv("LIMITED", raising=False)  # which `make test` sets
    make = makefile_in(tmp_path, f"RUN={sys.executable}")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()

    def replace(old, new):
        path = tmp_path / "book/01-one.ipynb"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    one = tmp_path / "_build/executed/01-one.ipynb"
    return SimpleNamespace(root=tmp_path, make=make, replace=replace, one=one,
                           run=functools.partial(make, one.relative_to(tmp_path)))


def ran(done):
    """Names of the notebooks that a call executed."""
    assert done.returncode == 0, done.stderr
    return [line.split()[0] for line in done.stdout.splitlines() if line.endswith(" MB")]


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_what_changed_is_run_again(project):
    small_notebook(project.root / "book/02-two.ipynb", "Two", "print('two')")
    executed = "_build/executed/01-one.ipynb", "_build/executed/02-two.ipynb"
    first = project.make(*executed)
    assert ran(first) == ["01-one", "02-two"]
    assert re.search(r"01-one +\d+\.\d s +\d+ MB", first.stdout)
    assert ran(project.make(*executed)) == []
    project.replace("# One", "# Eins")  # prose
    project.replace('"pass"', '"import sys"')  # the Colab cell
    assert ran(project.make(*executed)) == []
    project.replace("N = 3", "N = 4")
    assert ran(project.make(*executed)) == ["01-one"]
    (project.root / "lib/unravelling/__init__.py").write_text("x = 1")
    assert ran(project.make(executed[0])) == ["01-one"]
    (project.root / "data/a.csv").write_text("1")
    assert ran(project.make(executed[1])) == ["02-two"]
    assert ran(project.make(*executed)) == ["01-one"]
    (project.root / "data/a.csv").unlink()
    assert ran(project.make(*executed)) == ["01-one", "02-two"]


def test_edit_during_a_run_counts(project):
    module = project.root / "lib/unravelling/__init__.py"
    project.replace("print('N is', N)", f"open('{module}', 'w').close()")
    assert ran(project.run()) == ["01-one"]
    assert ran(project.run()) == ["01-one"], "the run saw the library as it was before"


def test_book_is_built_once_and_a_failing_cell_leaves_the_old_pages(project):
    assert ran(project.make("book")) == ["01-one"]
    pages = tree(project.root / "_build/html")
    assert b"N is 3" in pages[Path("book/01-one.html")]
    assert b"url=book/index.html" in pages[Path("index.html")]
    assert project.make("book").stdout == "open _build/html/index.html\n"

    project.replace("print('N is', N)", "1 / 0")
    done = project.make("book")
    assert done.returncode != 0
    assert "01-one.ipynb, cell 4 of 4: ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" not in done.stderr
    assert "ZeroDivisionError" in (project.root / "_build/reports/01-one.ipynb").read_text()
    assert tree(project.root / "_build/html") == pages
    assert project.make("book").returncode != 0, "a second try must not pass either"
    project.replace("1 / 0", "print('N was', N)")
    assert ran(project.make("book")) == ["01-one"]
    assert "N was 3" in (project.root / "_build/html/book/01-one.html").read_text()
    assert not (project.root / "_build/reports/01-one.ipynb").exists()


def test_notebooks_run_side_by_side_with_one_thread_each(project, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    toc = project.root / "_toc.yml"
    toc.write_text(toc.read_text() + "  - file: book/02-two\n")
    meet = (  # neither ends before the other has begun
        "import os, pathlib, time\n"
        f"here = pathlib.Path({str(project.root)!r})\n"
        "(here / {mine!r}).touch()\n"
        "end = time.monotonic() + 120\n"
        "while not (here / {other!r}).exists():\n"
        "    assert time.monotonic() < end, 'alone'\n"
        "    time.sleep(0.1)\n"
        "print('threads:', os.environ['OMP_NUM_THREADS'])")
    for name, mine, other in (("01-one", "one", "two"), ("02-two", "two", "one")):
        small_notebook(project.root / f"book/{name}.ipynb", name, meet.format(mine=mine, other=other))
    assert sorted(ran(project.make("book"))) == ["01-one", "02-two"]
    assert "threads: 1" in (project.root / "_build/html/book/02-two.html").read_text()


def test_warning_stops_the_pages_and_names_the_file(project):
    assert project.make("pages").returncode == 0
    pages = tree(project.root / "_build/committed")
    project.replace("# One", "# One\\n\\nSee {numref}`fig-absent`.")
    (project.root / "_toc.yml").open("a").write("  - file: book/02-two\n")
    done = project.make("pages")
    assert done.returncode != 0
    assert "book/01-one.ipynb" in done.stderr
    assert "fig-absent" in done.stderr
    assert "book/02-two" in done.stderr
    assert tree(project.root / "_build/committed") == pages
    assert project.make("pages").returncode != 0, "a second try must not pass either"
    assert not list((project.root / "_build").glob("*.new"))


def test_unknown_parameter_is_an_error_and_a_known_one_counts(project):
    done = project.run("PARAMETERS=-p M 5")
    assert done.returncode != 0
    assert re.search(r"parameter M\b.*01-one: N", done.stderr, flags=re.S)
    assert not project.one.exists()

    assert ran(project.run("PARAMETERS=-p N 5")) == ["01-one"]
    assert "N is 5" in project.one.read_text()
    assert ran(project.run("PARAMETERS=-p N 5")) == []
    assert ran(project.run()) == ["01-one"]
    assert "N is 3" in project.one.read_text()

    refused = project.make("refresh", "PARAMETERS=-p N 5")
    assert refused.returncode != 0
    assert "make refresh without PARAMETERS" in refused.stderr


@pytest.mark.parametrize(("source", "value", "wanted"), [
    ("N = 3", "0", "cannot be 0: it takes a whole number of at least 1"),
    ("N = None  # None: all", "0", "at least 1, below 2147483648, or null for the page's own choice"),
    ("N = 3", "2.5", "cannot be 2.5: it takes a whole number"),
    ("N = 3", "true", "cannot be True: it takes a whole number"),
    ("N = 3", "many", "cannot be 'many': it takes a whole number"),
    ("N = 3", "null", "cannot be None: it takes a whole number"),
    ("N = 3", "99999999999999999999", "it takes a whole number of at least 1, below 2147483648"),
    ("N = 3", "[1", "cannot be [1, which is no YAML: "),
    ("N = 3", "!!python/object:os.system", "cannot be !!python/object:os.system, which is no YAML: "),
    ("N = 0", "-1", "cannot be -1: it takes a whole number of at least 0"),
    ("N = False", "1", "it takes true or false"),
    ('N = \\"\\"', "1", "it takes text"),
])
def test_value_that_makes_no_sense_is_refused_with_what_may_be_set(project, source, value, wanted):
    project.replace("N = 3", source)
    done = project.run(f"PARAMETERS=-p N {value}")
    assert done.returncode != 0
    assert "the parameter N cannot be" in done.stderr
    assert wanted in done.stderr
    assert not project.one.exists()


def test_names_of_data_sets_and_recipes_are_those_of_the_stored_results():
    for name, value in (("DATASET", "cifar10"), ("RECIPE", "default"), ("RECIPE", "digits"), ("SEED", 0), ("N", None)):
        book.refuse(name, value, None if name == "N" else 0)
    with pytest.raises(book.BookError, match="DATASET cannot be 'mnist': it takes one of cifar10, digits"):
        book.refuse("DATASET", "mnist", "digits")
    with pytest.raises(book.BookError, match=r"RECIPE cannot be 'quick': it takes one of .*digits"):
        book.refuse("RECIPE", "quick", "default")


def test_unreadable_notebook_is_named(project):
    (project.root / "book/01-one.ipynb").write_text("<<<<<<< HEAD")
    done = project.make("book")
    assert done.returncode != 0
    assert "book/01-one.ipynb is not a readable notebook" in done.stderr


def test_kernel_that_is_killed_names_its_cell(project):
    die = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    small_notebook(project.root / "book/01-one.ipynb", "One", parameters("N = 3"), die, "print('N is', N)")
    done = project.run("PARAMETERS=-p N 5")
    assert done.returncode != 0
    assert "01-one.ipynb, cell 4 of 5: DeadKernelError" in done.stderr
    assert "Traceback" not in done.stderr
    assert not project.one.exists()


def test_notebook_above_the_limits_fails_but_not_with_parameters_of_its_own(project, monkeypatch):
    script = project.root / "scripts/book.py"
    script.write_text(script.read_text().replace("LIMIT = (1500, 60)", "LIMIT = (5, 60)"))
    done = project.run()
    assert done.returncode != 0
    assert re.search(r"01-one\.ipynb used \d+ MB and \d+ s of two cores; it may use 5 MB and 60 s", done.stderr)
    assert not project.one.exists()
    script.write_text(script.read_text().replace("LIMIT = (5, 60)", "LIMIT = (5000, 0)"))
    monkeypatch.setenv("LIMITED", "1")
    assert "it may use 5000 MB and 0 s" in project.run().stderr
    assert ran(project.run("PARAMETERS=-p N 5")) == ["01-one"]


def kernels(folder):
    """Processes at work in a folder or in its book, by number."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(entry / "cwd")) in (folder, folder / "book"):
                found.append(int(entry.name))
    return found


def builder(process):
    """The builder's process, which make started."""
    (found,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [
    lambda process: os.killpg(process.pid, signal.SIGINT),  # a terminal's Ctrl-C reaches the whole group
    lambda process: os.killpg(process.pid, signal.SIGKILL),
    lambda process: os.kill(process.pid, signal.SIGTERM),
    lambda process: os.kill(process.pid, signal.SIGKILL),
    lambda process: os.kill(builder(process), signal.SIGKILL),
], ids=["Ctrl-C", "all killed", "make ended", "make killed", "builder killed"])
def test_interrupted_run_leaves_no_process_and_is_not_taken_for_finished(project, how):
    started = project.root / "started"
    project.replace("print('N is', N)", f"open('{started}', 'w').close(); import time; time.sleep(3000)")
    process = project.run(start=subprocess.Popen, start_new_session=True, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not started.exists():
        assert time.monotonic() < deadline, "the notebook never started"
        time.sleep(0.05)
    assert len(kernels(project.root)) >= 3, "make, the builder and a kernel"
    how(process)
    assert process.wait(timeout=30) != 0
    assert not project.one.exists()
    deadline = time.monotonic() + 60
    while left := kernels(project.root):
        if time.monotonic() > deadline:
            for number in left:
                os.kill(number, signal.SIGKILL)
            pytest.fail("the kernel or the builder was still running")
        time.sleep(0.1)
    project.replace("time.sleep(3000)", "print('done')")
    assert ran(project.run()) == ["01-one"]
    assert "done" in project.one.read_text()


def test_progress_bars_leave_no_trace_and_warnings_are_reported(project):
    bar = "import sys\\nfor i in range(3):\\n    print(f'\\\\r{i}', end='', file=sys.stderr, flush=True)"
    project.replace("print('N is', N)", bar)
    done = project.run()
    assert ran(done) == ["01-one"]
    assert "wrote to stderr" not in done.stderr
    assert book.read(project.one).cells[-1].outputs == []
    project.replace("print(f'\\\\r{i}', end='', file", "print('beware', file")
    done = project.run()
    assert "01-one.ipynb, cell 4 wrote to stderr: beware" in done.stderr
    assert book.read(project.one).cells[-1].outputs == []


def test_refresh_writes_normalised_notebooks_once(project):
    (project.root / "book/index.md").unlink()
    plot = "import matplotlib.pyplot as plt\nplt.plot([0, 1]);"
    small_notebook(project.root / "book/index.ipynb", "Index", plot)
    project.replace('"metadata": {}', '"metadata": {"collapsed": true}')  # as an editor leaves it
    identifiers = [cell.id for cell in book.read(project.root / "book/01-one.ipynb").cells]
    done = project.make("refresh")
    assert ran(done) == ["01-one", "index"], done.stderr
    one = book.read(project.root / "book/01-one.ipynb")
    assert [cell.id for cell in one.cells] == identifiers
    assert [policy(one) for policy in (executed_in_order, nothing_vacuous, tidy, colab_cell)] == [[]] * 4
    assert one.cells[-1].outputs[0].text == "N is 3\n"
    picture = (project.root / "book/images/overview.png").read_bytes()
    assert picture.startswith(b"\x89PNG")

    before = tree(project.root / "book")
    assert "wrote" not in project.make("refresh").stdout
    shutil.rmtree(project.root / "_build")
    assert "wrote" not in project.make("refresh").stdout, "a fresh run of the same code changed the notebooks"
    assert tree(project.root / "book") == before


def test_placeholder_of_the_repository_is_warned_of_until_somebody_owns_it(project):
    assert "_config.yml is a placeholder" in project.make("pages").stderr
    (project.root / "README.md").write_text(f"See {book.settings()['repository']['url']}.")
    project.replace('"pass"', json.dumps(book.bootstrap()))
    assert "wrote README.md" in project.make("owner", "URL=https://github.com/me/mine/").stdout
    assert 'os.path.abspath("mine")' in book.read(project.root / "book/01-one.ipynb").cells[1].source
    assert (project.root / "README.md").read_text() == "See https://github.com/me/mine."
    project.replace("# One", "# Eins")
    assert project.make("pages").stderr == ""
    assert "/blob/plain/book/01-one.ipynb" in (project.root / "_build/committed/book/01-one.html").read_text()
    assert "github/me/mine/" in (project.root / "_build/committed/book/01-one.html").read_text()


@pytest.mark.parametrize("address", [
    "", "x", "me/mine", "https://github.com/me", "https://github.com//", "git@github.com:me/mine.git",
    "https://github.com/me/mine/tree/main", "https://gitlab.com/me/mine", "https://github.com/me/mi ne",
])
def test_what_is_no_address_of_a_repository_is_written_nowhere(project, address):
    (project.root / "README.md").write_text(f"See {book.settings()['repository']['url']}.")
    before = tree(project.root)
    done = project.make("owner", f"URL={address}")
    assert done.returncode != 0
    assert f"error: URL={address}: expected one such as https://github.com/you/book" in done.stderr
    assert tree(project.root) == before


def test_an_address_as_git_gives_it_will_do(project):
    assert project.make("owner", "URL=https://github.com/me/my.book.git").returncode == 0
    assert "  url: https://github.com/me/my.book\n" in (project.root / "_config.yml").read_text()


@pytest.mark.parametrize("words", [[], ["nothing"], ["execute"], ["pages", "a"], ["owner", "a", "b"]])
def test_a_call_that_is_none_shows_what_there_is(words):
    script = [sys.executable, ROOT / "scripts/book.py"]
    done = subprocess.run([*script, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "book.py execute 05-deleting-blocks" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("target", "kibibytes", "named"), [
    ("_build/executed/01-one.ipynb", 8, "_build/reports/01-one.ipynb could not be written: [Errno 27] File too large"),
    ("pages", 16, "book-math.woff2"),
    ("pages", 300, "the pages were not built in "),
])
def test_a_full_disk_names_what_could_not_be_written(project, target, kibibytes, named):
    """The operating system refuses to write more than so much into a file."""
    project.replace("print('N is', N)", "print('x' * 200_000)")
    limited = f"trap '' XFSZ; ulimit -f {kibibytes}; exec \"$@\""
    done = project.make(target, start=lambda words, **how: subprocess.run(["bash", "-c", limited, "-", *words], **how))
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project.root / target).exists()
    assert not list((project.root / "_build").glob("*.new"))


def test_failed_refresh_changes_no_output(project):
    project.make("refresh")
    project.replace("print('N is', N)", "1 / 0")
    before = tree(project.root / "book")
    assert project.make("refresh").returncode != 0
    assert tree(project.root / "book") == before


def test_outputs_go_to_the_code_that_made_them(tmp_path):
    executed = good()
    edited = good()
    edited.cells[5].source = "print(2 * N)"
    nbformat.write(edited, tmp_path / "a.ipynb")
    with pytest.raises(book.BookError, match=r"a\.ipynb is not the one that ran"):
        book.with_outputs(tmp_path / "a.ipynb", executed)
    edited.cells[5].source = executed.cells[5].source
    edited.cells[2].source = "Other prose."
    edited.cells[5].outputs = []
    nbformat.write(edited, tmp_path / "a.ipynb")
    filled = book.with_outputs(tmp_path / "a.ipynb", executed)
    assert filled.cells[5].outputs[0].text == "3\n"
    assert filled.cells[2].source == "Other prose."


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "page"
    assert book.write(path, "old")
    assert not book.write(path, "old")

    def full(self, data):
        with open(self, "wb") as stream:
            stream.write(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(book.BookError, match=f"{path} was not written: No space left on device"):
        book.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- the book's own runs -------------------------------------------------------------------------------------


def differing(stored, run):
    """Cells tagged nbval-check-output whose text, figures aside, is not the same in both notebooks."""
    def text(cell):
        outputs = copy.deepcopy(cell.outputs)
        for output in outputs:
            output.pop("execution_count", None)
            for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/")]:
                output.data.pop(kind)
        return json.dumps(outputs, sort_keys=True)

    pairs = zip(book.code(stored), book.code(run), strict=True)
    return [one.source for one, other in pairs if "nbval-check-output" in book.tags(one) and text(one) != text(other)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_repeats_what_is_stored(path):
    run = ROOT / "_build/executed" / path.name
    if not run.exists():
        pytest.skip("has not run; `make book` executes it")
    stored = book.read(path)
    assert [cell.source for cell in book.code(book.read(run)) if "injected-parameters" in book.tags(cell)] == []
    assert differing(stored, book.with_outputs(path, book.read(run))) == []


def test_a_differing_output_is_found():
    stored, run = good(), good()
    assert differing(stored, run) == []
    run.cells[4].outputs[0].data["image/png"] = "another"
    run.cells[5].outputs[0].text = "4\n"
    assert differing(stored, run) == [run.cells[5].source]
    run.cells[5].outputs = []
    assert differing(stored, run) == [run.cells[5].source]


# -- make ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
    """`make(script)` builds the environment with a shell script in place of Python, in a copy of the set-up."""
    python = tmp_path / "python"
    call = makefile_in(tmp_path, f"PYTHON={python}", ".venv/.installed")

    def run(script):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        return call()

    run.stamp = tmp_path / ".venv/.installed"
    return run


def test_old_python_is_refused_by_name(make):
    pretend = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2'; exec(sys.argv[1])"
    done = make(f'exec {sys.executable} -c "{pretend}" "$2"')
    assert done.returncode != 0
    assert "Python 3.10 or newer is needed" in done.stderr
    assert "3.9.2" in done.stderr
    assert not make.stamp.parent.exists()


def test_unfinished_environment_is_made_afresh(make):
    fake = """case "$*" in
      *"-m venv"*) echo "$*" >> calls; mkdir -p .venv/bin
        printf '#!/bin/sh\\nexec ./pip-says\\n' > .venv/bin/python; chmod +x .venv/bin/python;;
    esac"""
    folder = make.stamp.parents[1]
    pip = folder / "pip-says"
    pip.write_text("#!/bin/sh\nexit 1\n")
    pip.chmod(0o755)
    assert make(fake).returncode != 0
    assert not make.stamp.exists()
    pip.write_text("#!/bin/sh\nexit 0\n")
    assert make(fake).returncode == 0
    assert make.stamp.exists()
    assert (folder / "calls").read_text().count("venv --clear") == 2, "what pip left behind must be cleared"

    os.utime(folder / "requirements.txt", (time.time() + 5,) * 2)
    pip.write_text("#!/bin/sh\nexit 1\n")
    assert make(fake).returncode != 0
    assert not make.stamp.exists(), "an interrupted update counts as unfinished"
    assert (folder / "calls").read_text().count("venv --clear") == 2, "an update keeps what is installed"
