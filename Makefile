# The report's commands. With no environment active they make .venv; an active one is used and never changed.
DEVICE ?= auto
PROFILE ?= full
ONLY ?=
ARGS ?=

ifndef PYTHON
  ifdef VIRTUAL_ENV
    PYTHON := $(VIRTUAL_ENV)/bin/python
  else ifneq ($(filter-out base,$(CONDA_DEFAULT_ENV)),)
    PYTHON := $(CONDA_PREFIX)/bin/python
  else
    PYTHON := .venv/bin/python
    OWN := .venv/ready
  endif
endif
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: report replay publish test bench lab lint clean help ready
.DEFAULT_GOAL := help

report: ready ## measure this machine and write build/<device>/report.html and .pdf (DEVICE=auto|all|cpu|cuda:1 PROFILE=full|quick ONLY=02)
	@"$(PYTHON)" -m report.build measure --device "$(DEVICE)" --profile "$(PROFILE)" --only "$(ONLY)" $(ARGS)

replay: ready ## rebuild the report from committed data (DEVICE=nvidia-h200)
	@"$(PYTHON)" -m report.build replay --device "$(DEVICE)" --profile "$(PROFILE)" --only "$(ONLY)" $(ARGS)

publish: ready ## replay committed data, and if all laws hold keep its claims in data/, figures and report in figures/ (DEVICE=nvidia-h200)
	@"$(PYTHON)" -m report.build publish --device "$(DEVICE)" --profile "$(PROFILE)" --only "$(ONLY)" $(ARGS)

test: ready ## run the tests; those that need a GPU are skipped where there is none
	@"$(PYTHON)" -m pytest -m "not ci and not stress" -n auto --maxprocesses 8 $(ARGS)

bench: ready ## compare this project's clock with the reference timers (DEVICE=auto|cpu|cuda:1)
	@"$(PYTHON)" tests/agreement.py timers --device "$(DEVICE)" --check $(ARGS)

lab: ready ## open the overview in JupyterLab, and from there every notebook (ARGS="--port 9999 --no-browser")
	@"$(PYTHON)" -m jupyterlab notebooks/00_overview.ipynb $(ARGS)

lint: ready ## check code and notebooks with ruff, types with mypy
	@"$(PYTHON)" -m ruff check && "$(PYTHON)" -m ruff format --check && "$(PYTHON)" -m mypy

NEEDED = torch pandas matplotlib seaborn sympy psutil tqdm papermill nbconvert ipykernel ipywidgets
test bench: NEEDED += pytest xdist pymupdf
lint: NEEDED = ruff mypy
lab: NEEDED += jupyterlab
FIND := import importlib.util as u, sys; print(*[p for p in sys.argv[1:] if not u.find_spec(p)])
ready: $(OWN)
	@lacking=$$("$(PYTHON)" -c '$(FIND)' $(NEEDED)) || { echo "error: $(PYTHON) does not run" >&2; exit 1; }; \
	if [ -n "$$lacking" ]; then \
	  echo "error: $(PYTHON) lacks $$lacking; install with: $(PYTHON) -m pip install -e \".[dev]\"" >&2; exit 1; \
	fi

.venv/ready: pyproject.toml report/constraints.txt
	@echo "making .venv (torch and Jupyter: a few minutes of downloads the first time)"
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed" >&2; exit 1; }
	@python3 -m venv .venv && .venv/bin/python -m pip install --quiet -c report/constraints.txt -e '.[dev]' && touch $@

clean: ## remove what was generated: build/ and caches
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' $(MAKEFILE_LIST) | expand -t 10
