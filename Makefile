# Every target sets up what it needs in .venv; each works alone on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INPUTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test test-slow lint wheel clean

demo: .venv/demo.stamp
	$(BIN)/dllm-engine demo

test: .venv/test.stamp
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: .venv/test.stamp
	$(BIN)/pytest -m "slow and not gpu"

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/demo.stamp
	$(BIN)/pip wheel --no-deps -w dist .

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: $(INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/%.stamp: $(INPUTS) | $(BIN)/pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$*]"
	touch $@
