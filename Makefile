# make demo   train on real signing, reconstruct signing never seen in training, show it (a quarter of an hour on two busy cores)
# make test   ruff, mypy, pytest
# Both prepare .venv by themselves. `make setup TORCH="torch --index-url URL"` installs another build of torch.

.DEFAULT_GOAL := help
.PHONY: help setup demo test pytest test-slow lint format clean
.DELETE_ON_ERROR:

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check

help:
	@sed -n 's/^# //p' Makefile | head -3

# --- .venv -----------------------------------------------------------------------------------------------------------

setup: $(VENV)/.installed

# torch comes first and alone: the build named here is then the one that every other package finds. Compiled at once:
# without byte code, as under PYTHONDONTWRITEBYTECODE, each command takes seconds longer to start. A third of the files
# are tests of packages and models of others.
NEVER_IMPORTED := /tests/|/transformers/models/(?!auto/|__init__)
$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install it or say make PYTHON=PATH."; exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile $(TORCH)
	$(PIP) install --no-compile --editable ".[dev]"
	@$(BIN)/python -m compileall -qq -j 0 -x '$(NEVER_IMPORTED)' $(VENV)/lib || true # some files are for other versions of Python
	@touch $@

# Apart from the rest: the recordings are 96 MB that the tests do not need.
$(VENV)/.installed-demo: $(VENV)/.installed
	$(PIP) install --no-compile --editable ".[demo]"
	@touch $@

# --- the main job ----------------------------------------------------------------------------------------------------

# The documented commands themselves. Tested on languages that are never trained on: American, Portuguese, Spanish and
# Turkish. accelerate launch takes one core where OMP_NUM_THREADS does not say otherwise.
DEMO := runs/demo
DEMO_INPUT := spoken_to_signed:assets/fingerspelling_lexicon
DEMO_OPTIONS :=
demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
demo: $(VENV)/.installed-demo
	rm -rf $(DEMO)
	python scripts/prepare_data.py --input $(DEMO_INPUT) --output $(DEMO)/data \
		--split-by prefix --split.val csq,swl --split.test ase,psr,ssp,tsm
	accelerate launch training/train.py --config configuration/small.yaml \
		--data.path $(DEMO)/data --training.output_dir $(DEMO)/training $(DEMO_OPTIONS)
	cp -r $(DEMO)/training/best $(DEMO)/model
	python scripts/extract_tokens.py --model $(DEMO)/model --data $(DEMO)/data --split test --output $(DEMO)/tokens
	python scripts/evaluate.py --model $(DEMO)/model --data $(DEMO)/data --split test --output $(DEMO) --visualize
	@echo "The same with pretrained/small, which saw more recordings, none of them in these languages:"
	python scripts/evaluate.py --model pretrained/small --data $(DEMO)/data --split test --output $(DEMO)/pretrained

# --- checks ----------------------------------------------------------------------------------------------------------

# Side by side: mypy takes one core for the better part of a minute.
test: setup
	$(MAKE) --jobs 2 lint pytest

pytest: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --quiet

test-slow: setup
	$(BIN)/python -m pytest -m slow --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .cache build *.egg-info
