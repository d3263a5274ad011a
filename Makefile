# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench clean

demo: .venv/.installed
	$(BIN)/microtome demo

test: .venv/.dev
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

bench: .venv/.dev
	$(BIN)/python benchmarks/slicegpt.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and pinned, so that no other package decides which build of it is taken
.venv/.installed: pyproject.toml requirements.txt | .venv/bin/python
	$(BIN)/pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.txt -e .
	touch $@

.venv/.dev: .venv/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c requirements.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo-out
