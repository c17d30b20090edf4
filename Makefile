# make book      execute every notebook and build the pages        make refresh   write fresh outputs into book/
# make test      lint, make book, run every test                   make pages     the pages from the outputs in book/
# make clean     remove _build, never runs, .venv, data            make bench     compare speed, side by side
# make weights   train and measure the shipped networks anew       make paper     CIFAR-10, hours to days: stop at will
# make pdf       the book as one file, printed by Chromium            make figures   drawings and captions, for slides
#
# make refresh ONLY=05-deleting-blocks                      one notebook
# make book PARAMETERS="-p DATASET cifar10"                 every notebook that has the parameter, with this value
#
# make owner URL=https://github.com/you/book         name the repository, once, wherever it is named
#
# Needs Python >= 3.10 (make PYTHON=python3.12 to choose one) and access to a package index, nothing else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := book
.PHONY: book test refresh pages pdf figures notes weights paper bench mutants clean owner lock

PYTHON ?= python3
RUN := .venv/bin/python
PIP = $(RUN) -m pip install --disable-pip-version-check --quiet

# Readers get the ranges of requirements.txt; make LOCKED=1 installs the versions, with hashes, of requirements.lock.
# The stamp is the last thing written: without it the environment counts as unfinished and is made afresh.
.venv/.installed: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, and " \
	  + sys.executable + " is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12")'
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "installing $(if $(LOCKED),requirements.lock,requirements.txt) into .venv; this takes minutes the first time," \
	  "and gigabytes on Linux"
	@$(PIP) $(if $(LOCKED),--require-hashes --requirement requirements.lock,--requirement requirements.txt)
	@$(if $(LOCKED),$(PIP) --no-deps --no-build-isolation --editable .)
	@touch $@

# A run depends on the notebook's code and parameters, which `notes` extracts, on the library and on the data (folders
# too, since a file may be removed). What changes none of them runs nothing: prose, and outputs written back.
NAMES := $(basename $(notdir $(wildcard book/*.ipynb)))
LIBRARY := $(shell find lib/unravelling -name '*.py') $(wildcard book/*.py book/_static/interactive* experiments/config.yaml)
DATA := $(shell find data -not -path '*/.*')
PAGES := _config.yml _toc.yml $(wildcard scripts/*.*) $(LIBRARY) $(shell find book -type f -not -path '*/[._]*cache*' -not -path '*/.*')

# Networks are small: a thread a process, and as many notebooks at a time as JOBS says.
JOBS ?= 2
book test: export OMP_NUM_THREADS := 1

book:
	@$(MAKE) --no-print-directory --jobs $(JOBS) _build/html/index.html
	@echo "open _build/html/index.html"

notes: .venv/.installed
	@$(RUN) scripts/book.py prepare $(PARAMETERS)

NOTES := $(NAMES:%=_build/code/%.json) _build/code/versions.json
$(NOTES): notes ;

$(NAMES:%=_build/executed/%.ipynb): _build/executed/%.ipynb: _build/code/%.json _build/code/versions.json $(LIBRARY) $(DATA)
	@$(RUN) scripts/book.py execute $*

_build/html/index.html: $(NAMES:%=_build/executed/%.ipynb) $(PAGES)
	@$(RUN) scripts/book.py pages _build/executed _build/html

pages: _build/committed/index.html
	@echo "open $<"

_build/committed/index.html: .venv/.installed $(PAGES)
	@$(RUN) scripts/book.py pages book _build/committed

pdf: _build/book.pdf

_build/book.pdf: _build/committed/index.html scripts/pdf.py
	@$(RUN) scripts/pdf.py _build/committed $@

ONLY ?= $(NAMES)

# The pages leave the plain edition, whose captions have numbers.
figures: _build/committed/index.html
	@OMP_NUM_THREADS=2 $(RUN) scripts/figures.py _build/figures $(ONLY:%=_build/plain/book/%.ipynb)
	@echo "figures in _build/figures"

refresh: $(ONLY:%=_build/executed/%.ipynb)
	@$(RUN) scripts/book.py refresh $(ONLY)
ifneq ($(and $(PARAMETERS),$(filter refresh,$(MAKECMDGOALS))),)
$(error book/ holds the outputs of the parameters as they stand there: make refresh without PARAMETERS)
endif

# The notebooks run once, and the tests look at these runs and at the pages built from them; so a second `make test`
# executes only what changed, like `make book`. A short chapter runs once more, by nbval: what compares those runs is
# itself compared.
EXACT := 01-residual-connections
test: export LIMITED := 1
test: .venv/.installed .venv/.experiments
	$(RUN) -m ruff check .
	@$(MAKE) --no-print-directory book
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --nbval-lax --nbval-current-env tests $(EXACT:%=book/%.ipynb)

# Snakemake and what it needs are installed for these two and the tests alone. Options and targets go into PAPER, such as
# make paper PAPER='tier1 --cores 4', and make paper PAPER=-n says what remains. CIFAR-10 is where UNRAVELLING_DATA says.
.venv/.experiments: .venv/.installed experiments/requirements.txt
	@$(PIP) $(if $(LOCKED),--require-hashes --requirement requirements.lock,--requirement experiments/requirements.txt)
	@touch $@

SNAKEMAKE = $(RUN) -m snakemake --snakefile experiments/Snakefile
paper: .venv/.experiments
	@exec $(SNAKEMAKE) $(PAPER)

weights: .venv/.experiments
	@exec $(SNAKEMAKE) weights $(PAPER)

owner: .venv/.installed
	@$(RUN) scripts/book.py owner '$(URL)'

# Needs uv, which CONTRIBUTING.md says how to get.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --no-emit-package unravelling $(UPGRADE) requirements.txt experiments/requirements.txt --output-file requirements.lock

# What it is compared with is installed for this alone: make bench BENCH='--only training --rounds 3'
bench: .venv/.installed
	@$(PIP) --requirement benchmarks/requirements.txt
	$(RUN) benchmarks/bench.py $(BENCH)

# Which small faults in a module do its tests miss? cosmic-ray, an hour or so: make mutants MODULE=chain SEED=13
MODULE = stats
SAMPLE = 60
SEED = 12
mutants: .venv/.installed
	@$(PIP) cosmic-ray
	@$(RUN) tests/mutants.py $(MODULE) $(SAMPLE) $(SEED)

clean:
	rm -rf _build
