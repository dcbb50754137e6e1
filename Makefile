# Each target does its own set-up: `make demo` and `make test` work in an empty clone.
# Nothing outside this folder is changed; the environment lives in .venv.

PYTHON ?= python3
VENV ?= .venv
# Handed to pip, for example: make setup PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# Test processes.
JOBS ?= 2

# What the demo shows: two easy tasks and a harder one, four agents of fewer blocks than the paper's.
DEMO_DATA := --tasks drawer-open-v3 button-press-topdown-v3 peg-insert-side-v3 --episodes 20 --workers 2
ENC_DEC := encoder.layers=2,decoder.layers=2
DEMO_AGENTS := --agents mail/ed-ma-ddpm,$(ENC_DEC) mail/ed-ma-bc,$(ENC_DEC) mail/d-ma-bc,decoder.layers=4 \
	mail/ed-tr-bc,$(ENC_DEC) mean-action random \
	--common history=1,language=hash,optim.batch_size=128,optim.schedule=cosine \
	--seeds 0 1 --steps 500 --eval-episodes 20 --videos 1 --title "MaIL on three Meta-World tasks" \
	--notes "The networks have 4 blocks instead of the paper's 8 to 18, see states instead of images and train for 500 updates: this compares the architectures at a small size, it does not reproduce the paper."
# Further flags for scripts/compare.py; they come last and win.
DEMO_FLAGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
CHECKED := $(VENV)/.checked
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

# A name for the exact content of the checkout, or nothing when git cannot say.
STATE := git rev-parse --is-inside-work-tree >/dev/null 2>&1 && \
	{ git ls-files -co --exclude-standard; \
	  git ls-files -co --exclude-standard | git hash-object --stdin-paths; } 2>&1 | git hash-object --stdin

.PHONY: help setup install demo test lint format docs clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | \
		awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: ## make .venv with the tested versions of everything that runs on a CPU
	@if [ -f $(READY) ] && [ ! pyproject.toml -nt $(READY) ] && [ ! constraints.txt -nt $(READY) ]; then \
		echo "setup: reusing $(VENV) (pyproject.toml and constraints.txt are unchanged)"; \
	else \
		$(MAKE) --no-print-directory install; \
	fi

install:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
		echo "setup: '$(PYTHON)' was not found. Install Python 3.11 to 3.13, or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "setup: '$(PYTHON)' is $$($(PYTHON) -V 2>&1). The tested versions need Python 3.11, 3.12 or 3.13." >&2; \
		echo "       Name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@rm -f $(READY) $(CHECKED)
	@$(BIN)/python -c 'import pip' >/dev/null 2>&1 || { rm -rf $(VENV); \
		echo "setup: creating $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
		echo "setup: $(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "setup: installing the versions of constraints.txt (a few minutes the first time)"
	@# One command that names torch: a later one would replace its build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch -e ".[all,dev]"
	@# What it needs came with the extra "libero"; what it declares needs a C++ compiler.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt --no-deps hf-libero
	@touch $(READY)
	@echo "setup: done. 'source $(BIN)/activate' to use it, '$(BIN)/mail-agents doctor' to see what works."

demo: setup ## collect demonstrations, train agents, compare them, write a report
	@if [ -f data/demo/manifest.json ]; then echo "demo: reusing the demonstrations in data/demo"; \
	else $(BIN)/python scripts/collect.py --output data/demo $(DEMO_DATA); fi
	$(BIN)/python scripts/compare.py --datasets data/demo --output runs/demo $(DEMO_AGENTS) $(DEMO_FLAGS)

test: setup ## every check: format, lint, types, tests with coverage
	@now=$$($(STATE)); \
	if [ -n "$$now" ] && [ -z "$(FORCE)" ] && [ "$$now" = "$$(cat $(CHECKED) 2>/dev/null)" ]; then \
		echo "test: reusing the result of the last run: all checks passed on exactly these files (make test FORCE=1 repeats them)"; \
	else \
		rm -f $(CHECKED); $(MAKE) --no-print-directory checks && echo "$$now" > $(CHECKED) && echo "test: all checks passed"; \
	fi

define LINT
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
endef

.PHONY: checks
checks:
	$(LINT)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov=mail_agents --cov-report=term --cov-fail-under=90

lint: setup ## format, lint and type checks only
	$(LINT)

format: setup ## rewrite files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove everything make made, except runs/ and data/
	rm -rf $(VENV) build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis *.egg-info
