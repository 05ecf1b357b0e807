# Two commands need nothing else on a fresh machine with Python 3.11 and a package index:
#   make demo   the comparison on the default model
#   make test   lint, types, tests, documentation
# make test-integrations runs the tests of lm_eval, kvpress and Chromium, the first two in environments of their own.
# The paper's tables and figures into results/, running what is missing (all of it needs weights, data and a GPU):
#   make paper-tables MODEL=smollm2-135m LIMIT=10 PROMPT=1500 DATA=DIR OFFICIAL=DIR2
#   make paper-tables EXPERIMENT="longbench needle" MODEL=llama2-7b-chat SET="output.root=runs"
#   make paper-tables REBUILD=1    nothing runs: from the records alone
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

LM_EVAL := .venv-lm-eval
KVPRESS := .venv-kvpress

.PHONY: test-integrations test-lm-eval test-kvpress test-chromium demo paper-tables test lint types unit docs install clean

install: $(STAMP)

# pip reads the pins from constraints.txt: the versions the project was tested with.
$(STAMP): pyproject.toml constraints.txt requirements-ruler.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[ruler]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-ruler.txt
	touch $@

demo: $(STAMP)
	$(BIN)/python -m kvbench

paper-tables: $(STAMP)
	$(BIN)/python -m kvbench.paper \
	  $(if $(EXPERIMENT),--experiment $(EXPERIMENT)) $(if $(MODEL),--model $(MODEL)) $(if $(LIMIT),--limit $(LIMIT)) \
	  $(if $(PROMPT),--prompt-tokens $(PROMPT)) $(if $(DATA),--data $(DATA)) $(if $(OFFICIAL),--official $(OFFICIAL)) \
	  $(if $(SET),--override $(SET)) $(if $(REBUILD),--rebuild)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Two processes with one thread each: threads of both would only wait for each other.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# ..._WARNING: notices of two plug-ins about a future mkdocs, which constraints.txt keeps out.
docs: $(STAMP)
	DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test: lint types unit docs

test-integrations: test-lm-eval test-kvpress test-chromium

$(LM_EVAL)/.installed: pyproject.toml constraints.txt constraints-lm-eval.txt
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(LM_EVAL)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(LM_EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-lm-eval.txt \
	  pytest pytest-randomly --editable ".[lm_eval]"
	touch $@

# kvpress wants a transformers older than ours, so kvbench itself is not installed here but imported from this folder.
$(KVPRESS)/.installed: requirements-kvpress.txt
	$(PYTHON) -m venv $(KVPRESS)
	$(KVPRESS)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(KVPRESS)/bin/python -m pip install --quiet --requirement requirements-kvpress.txt
	touch $@

# What is missing is skipped with its reason, and fails where CI is set (tests/conftest.py).
test-lm-eval: $(LM_EVAL)/.installed
	OMP_NUM_THREADS=1 KVBENCH_INTEGRATION=lm_eval $(LM_EVAL)/bin/python -m pytest -m integration tests/integrations

test-kvpress: $(KVPRESS)/.installed
	OMP_NUM_THREADS=1 KVBENCH_INTEGRATION=kvpress $(KVPRESS)/bin/python -m pytest tests/docs/test_kvpress_page.py \
	  tests/integrations/test_compare_official.py

test-chromium: $(STAMP)
	OMP_NUM_THREADS=1 KVBENCH_INTEGRATION=chromium $(BIN)/python -m pytest -m integration tests/results

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
