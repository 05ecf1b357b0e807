# Two commands need nothing else on a fresh machine with Python 3.11 and a package index:
#   make demo   the comparison on the default model
#   make test   lint, types, tests
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types unit install clean

install: $(STAMP)

# pip reads the pins from constraints.txt: the versions the project was tested with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

demo: $(STAMP)
	$(BIN)/python -m kvbench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Two processes with one thread each: threads of both would only wait for each other.
unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint types unit

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
