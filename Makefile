# Every target sets up what it needs in .venv; each works alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
PYTEST = $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal
INPUTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test test-slow lint wheel bench gpu clean

demo: .venv/demo.stamp
	$(BIN)/dllm-engine demo

test: .venv/test.stamp
	$(PYTEST) -m "not slow and not gpu"

test-slow: .venv/test.stamp
	$(PYTEST) -m "slow and not gpu"

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sdist, and the wheel out of it: what is missing in one fails here.
wheel: .venv/build.stamp
	rm -rf dist
	$(BIN)/python -m build

# The whole engine against the loops that people run, at sizes for two cores: about six minutes on an idle machine.
bench: .venv/plots.stamp
	$(BIN)/python benchmarks/end_to_end.py --case vocab
	$(BIN)/python benchmarks/end_to_end.py --case demo --plot build/end_to_end.png
	$(BIN)/python benchmarks/block_step.py --small
	$(BIN)/python benchmarks/scaling.py --plot build/scaling.png

# Everything that needs a CUDA device; NO_VENV=1 takes $(PYTHON) as it is. ARGS=--dry-run stops before the GPU.
gpu: $(if $(NO_VENV),,.venv/test.stamp)
	$(if $(NO_VENV),$(PYTHON),$(BIN)/python) benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: $(INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/lint.stamp: $(INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[lint]"
	touch .venv/test.stamp $@  # which it takes in

.venv/%.stamp: $(INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@
