PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-distributed bench lint format docs clean

# The virtual environment is made anew when what it must hold changes.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: .venv/.done

demo: setup
	$(BIN)/gpm-trl quickstart --stage all --output_dir demo

test: setup
	$(BIN)/pytest -n 2 -m "not slow and not gpu"

# The recipes on eight processes, resumed and killed runs in every way: half an hour on two cores.
test-distributed: setup
	$(BIN)/pytest -m "multiprocess and slow"

bench: setup
	$(BIN)/python tests/benchmarks/ranking.py
	$(BIN)/python tests/benchmarks/gpo.py
	$(BIN)/python tests/benchmarks/score_memory.py
	$(BIN)/python tests/benchmarks/trainer.py
	$(BIN)/python tests/benchmarks/shared_prefix.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv demo build dist site *.egg-info
