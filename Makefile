PYTHON ?= python3
BIN := .venv/bin
# What everybody runs: in minutes. Of the tests that start processes, it has one of ZeRO-3 and one of a killed run on DDP.
QUICK := not gpu and not slow and not real and (not multiprocess or smoke)
REST := (slow or multiprocess) and not smoke and not gpu

.PHONY: setup demo test test-all test-real test-lowest test-latest paper-table bench lint format docs clean

# The virtual environment is made anew when what it must hold changes.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: .venv/.done

demo: setup
	$(BIN)/gpm-trl quickstart --output_dir demo
	$(BIN)/python recipes/letters_policy/run.py --output_dir demo

test: setup
	$(BIN)/pytest -n 2 -m "$(QUICK)"

# What `make test` leaves out: launched and killed runs in every way, the quickstarts, memory.
test-all: setup
	$(BIN)/pytest -n 2 -m "$(REST)"

# Real models and tokenizers: fetched into .real at the first time (1.7 GB), then three minutes on two cores.
test-real: setup
	$(BIN)/pip install --quiet --constraint constraints.txt gguf
	$(BIN)/python tests/real/fetch.py
	$(BIN)/pytest -n 2 --dist loadfile tests/real

.venv-lowest/.done: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable ".[test,viz]"
	touch $@

# The lowest versions that pyproject.toml admits.
test-lowest: .venv-lowest/.done
	.venv-lowest/bin/pytest tests/test_contracts.py
	.venv-lowest/bin/pytest -n 2 -m "$(QUICK)"

# The newest that pyproject.toml admits, whatever they are today; torch stays, as a bare one brings gigabytes of CUDA.
test-latest:
	test -d .venv-latest || $(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test,viz]" torch==2.13.0
	.venv-latest/bin/pytest tests/test_contracts.py
	.venv-latest/bin/pytest -n 2 -m "$(QUICK)"

# The tables of docs/results.md, its pictures and the samples, from the reports in docs/results.
paper-table: setup
	$(BIN)/python recipes/smollm2-135m/tables.py docs/results/smollm2-135m-*.json \
		--pictures docs/images --samples docs/samples.md

bench: setup
	$(BIN)/python tests/benchmarks/ranking.py
	$(BIN)/python tests/benchmarks/training.py gpm --steps 20
	$(BIN)/python tests/benchmarks/training.py gpo
	$(BIN)/python tests/benchmarks/training.py gprl
	$(BIN)/python tests/benchmarks/training.py packed
	$(BIN)/python tests/benchmarks/policy.py
	$(BIN)/python tests/benchmarks/score_memory.py
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
	rm -rf .venv .venv-lowest .venv-latest demo build dist site *.egg-info
