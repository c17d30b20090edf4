# make book      execute every notebook and build the pages        make refresh   write fresh outputs into book/
# make test      lint, build, run every test and every notebook    make weights   train the shipped networks anew
# make clean     remove _build, never runs, .venv or data          make bench     compare speed, side by side
# make paper     train and measure the CIFAR-10 networks, hours to days; stop it and call it again at will
#
# Needs Python >= 3.10 (make PYTHON=python3.12 to choose one) and access to a package index, nothing else.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := book
.PHONY: book test refresh weights paper bench clean

PYTHON ?= python3
RUN := .venv/bin/python

# The stamp is the last thing written: without it the environment counts as unfinished and is made afresh.
.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, and " \
	  + sys.executable + " is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12")'
	@test -e $@ || $(PYTHON) -m venv --clear .venv
	@rm -f $@
	@echo "installing requirements.txt into .venv; this takes minutes the first time, and gigabytes on Linux"
	@$(RUN) -m pip install --disable-pip-version-check --quiet --requirement requirements.txt
	@touch $@

book: .venv/.installed
	@$(RUN) scripts/book.py execute
	@$(RUN) scripts/book.py html

test: .venv/.installed
	$(RUN) -m ruff check .
	$(RUN) scripts/book.py html --committed
	$(RUN) -m pytest --nbval-lax --nbval-current-env tests book

refresh: .venv/.installed
	@$(RUN) scripts/book.py refresh

# Snakemake and what it needs are installed for these two alone. Options and targets go into PAPER, such as
# make paper PAPER='tier1 --cores 4', and make paper PAPER=-n says what remains. CIFAR-10 is where UNRAVELLING_DATA says.
.venv/.experiments: .venv/.installed experiments/requirements.txt
	@$(RUN) -m pip install --disable-pip-version-check --quiet --requirement experiments/requirements.txt
	@touch $@

SNAKEMAKE = $(RUN) -m snakemake --snakefile experiments/Snakefile
paper: .venv/.experiments
	@exec $(SNAKEMAKE) $(PAPER)

weights: .venv/.experiments
	@exec $(SNAKEMAKE) weights $(PAPER)

bench: .venv/.installed
	$(RUN) benchmarks/bench.py

clean:
	rm -rf _build
