# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= build/demo

.PHONY: demo test lint benchmarks clean

demo: $(VENV)/installed
	@mkdir -p $(OUT)
	$(BIN)/pfmc compile models/bard/model.onnx --target rom -o $(OUT)/bard-rom.pfm
	$(BIN)/pfmc compile models/bard/model.onnx --target crossbar -o $(OUT)/bard-crossbar.pfm
	$(BIN)/pfmc compile models/bard/model.onnx --target optical -o $(OUT)/bard-optical.pfm
	$(BIN)/pfmc compare $(OUT)/bard-rom.pfm $(OUT)/bard-crossbar.pfm $(OUT)/bard-optical.pfm

test: $(VENV)/installed-dev lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-dev
	$(BIN)/ruff check pfmc tests benchmarks models
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python pfmc

benchmarks: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache
