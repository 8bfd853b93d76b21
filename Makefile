# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow lint schema clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 setuptools wheel
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The main job on the embedded default: no network, no GPU, about five minutes on two cores.
demo: $(VENV)/.ready
	$(BIN)/python -m align_pipeline.data.shop configs/shop
	$(BIN)/align run configs/quickstart.yaml

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow"

# Kills, real data, the whole demo.
test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m slow

# mypy cannot follow setuptools' editable install, so it gets the tree under its import name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/align_pipeline
	$(BIN)/mypy -p align_pipeline.pipeline -p align_pipeline.data

schema: $(VENV)/.ready
	$(BIN)/align schema > configs/schema.json

clean:
	rm -rf $(VENV) build *.egg-info runs configs/shop
