# Each target creates its own virtual environment. `make help` lists the targets.
PYTHON ?= $(shell for v in 3.11 3.12; do p=$$(command -v python$$v) && $$p -V >/dev/null 2>&1 && { echo $$p; break; }; done || true)
PYTHON := $(if $(PYTHON),$(PYTHON),python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WHEELS ?= wheels
KERNEL_TESTS := tests/test_rows.py tests/test_linear_logprobs.py tests/test_tapo_loss.py

export TOKENIZERS_PARALLELISM = false

.PHONY: install help demo demo-seeds demo-forms test test-core docs lint bench bench-kernels bench-objectives \
	bench-step bench-whole-step gpu \
	gpu-rehearsal gpu-wheels bench-figures bench-rollout bench-overlap bench-evaluation kernel-table gpu-folder test-kill \
	test-sglang clean

install: $(STAMP)  ## the virtual environment .venv, with Tercet and what its tests need (2.5 GB)

help:  ## list the targets
	@awk -F ':.*  ## ' '/^[a-z].*:.*  ## / {printf "%-34s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(STAMP): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c "import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), f'Python 3.11 or 3.12 is needed, not {sys.version}: make PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch -c $(CONSTRAINTS)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' -c $(CONSTRAINTS)
	touch $@

demo: $(STAMP)  ## draw a world, teach a tiny policy, improve it with TAPO: 3 minutes on 2 cores
	TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 $(BIN)/torchrun --nproc-per-node 1 train/tapo.py

# Named before their first run, and used for the tables in docs/demo.md only; 100 to 109 are for trials.
DEMO_SEEDS := 0 1 2 3 4
WORKERS ?= 2
demo-seeds: $(STAMP)  ## five seeds of the demo beside their controls; goes on where it was stopped
	$(BIN)/python -m tercet.train.demo --seeds $(DEMO_SEEDS) --workers $(WORKERS) --out runs/demo_seeds
	$(BIN)/python -m tercet.train.demo --seeds $(DEMO_SEEDS) --workers $(WORKERS) --out runs/demo_seeds_opaque \
		--names opaque

# Named before their first run: 5 to 9 to choose the form of the loss, 10 to 12 to confirm the choice.
FORM_SEEDS := 5 6 7 8 9
demo-forms: $(STAMP)  ## forms of the loss on five seeds of the demo; goes on where it was stopped
	$(BIN)/python -m tercet.train.demo --seeds $(FORM_SEEDS) --arms forms --workers $(WORKERS) --out runs/forms

test: $(STAMP)  ## all tests; then those of the kernels again, in Triton's interpreter
	$(BIN)/pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 $(KERNEL_TESTS)

# The server has an environment of its own, kept in the user's cache and named after its pins.
SGLANG_VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/tercet/sglang-$(shell cat tests/sglang_cpu/*.py tests/sglang_cpu/*.toml tests/sglang_cpu/*.txt | sha256sum | cut -c1-12)
test-sglang: $(STAMP) $(SGLANG_VENV)/installed  ## the rollout engine against a real SGLang server on the CPU
	TERCET_SGLANG_PYTHON=$(SGLANG_VENV)/bin/python $(BIN)/pytest -m sglang

$(SGLANG_VENV)/installed:
	$(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps -r tests/sglang_cpu/requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install -q --disable-pip-version-check ./tests/sglang_cpu
	touch $@

bench-evaluation: $(STAMP) $(SGLANG_VENV)/installed  ## questions a second beside transformers' generate
	$(BIN)/python -m tercet.bench.evaluation --python $(SGLANG_VENV)/bin/python

bench-rollout: $(STAMP) $(SGLANG_VENV)/installed  ## sampling on a server beside SGLang's own client
	$(BIN)/python -m tercet.bench.rollout --python $(SGLANG_VENV)/bin/python

bench-overlap: $(STAMP) $(SGLANG_VENV)/installed  ## what sampling ahead gains on a server of its own core
	$(BIN)/python -m tercet.bench.overlap --python $(SGLANG_VENV)/bin/python

test-kill: $(STAMP)  ## kill -9 a run at 20 random points, on one rank, on two and with async saving
	TERCET_KILLS=20 $(BIN)/pytest -n 2 -m kill

test-core: $(STAMP)  ## the quick tests that need no trained model
	$(BIN)/pytest -n 2 -m core

docs: $(STAMP)  ## the documentation as a site, in build/docs; broken links are errors
	$(BIN)/python docs/make_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)  ## ruff and its formatter, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## one small case of each benchmark
	$(BIN)/pytest bench --benchmark-only -o python_files='*.py'

bench-kernels: $(STAMP)  ## head and loss beside their peers, into bench/results/kernels.csv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]' -c $(CONSTRAINTS)
	$(BIN)/python -m tercet.bench.kernels

bench-objectives: $(STAMP)  ## an update step of each objective beside TAPO's, into bench/results/objectives.csv
	$(BIN)/python -m tercet.bench.objectives

bench-step: $(STAMP)  ## an update step beside other ways to compute it, into bench/results/step.csv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]' -c $(CONSTRAINTS)
	$(BIN)/python -m tercet.bench.step

bench-whole-step: $(STAMP)  ## whole steps beside TRL's GRPOTrainer, into bench/results/whole_step.csv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]' -c $(CONSTRAINTS)
	$(BIN)/python -m tercet.bench.whole_step

# On a GPU machine, with its own python3, torch and transformers, and the wheels in WHEELS.
# make gpu OUT=folder PARTS="card tests kernels": within 9 minutes; bench/gpu.py lists the parts.
PARTS ?=
OUT ?= runs/gpu
gpu: gpu-folder  ## all GPU tests and benchmarks in one run of 9 minutes, into OUT
	PYTHONPATH=$(CURDIR)/build/gpu python3 -m tercet.bench.gpu --out $(OUT) $(if $(PARTS),--parts $(PARTS))

gpu-rehearsal: $(STAMP)  ## the same on this machine's CPU, with small shapes
	$(BIN)/python -m tercet.bench.gpu --device cpu --out $(OUT)

# What a GPU machine with torch and transformers lacks, for its Python 3.12.
GPU_WHEELS := jsonargparse==4.53.0 docstring-parser==0.18.0 typeshed-client==2.15.0 httpx==0.28.1 \
	idna==3.20 pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 \
	typing-inspection==0.4.5 imagehash==4.3.2 pywavelets==1.10.0 py3langid==0.4.0 \
	liger-kernel==0.8.5 cut-cross-entropy==25.1.1 trl==1.16.0 datasets==5.2.0 dill==0.4.1 \
	multiprocess==0.70.19 prefix-grouper==0.0.1.post1
gpu-wheels: $(STAMP)  ## download what a GPU machine lacks, into WHEELS (15 MB)
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
		--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-d $(WHEELS) $(GPU_WHEELS)

gpu-folder:  ## what the GPU benchmarks import, in build/gpu
	mkdir -p build/gpu/tercet
	for folder in core kernels rollout train bench; do ln -sfn $(CURDIR)/$$folder build/gpu/tercet/$$folder; done
	for wheel in $(wildcard $(WHEELS)/*.whl); do python3 -m zipfile -e $$wheel build/gpu; done

bench-figures: $(STAMP)  ## the figures, from the rows in bench/results
	$(BIN)/python -m tercet.bench.figures

kernel-table: $(STAMP)  ## registers, spills and shared memory of every kernel, with no GPU
	$(BIN)/python -m tercet.bench.compile_kernels

clean:  ## remove the virtual environment, build files and runs
	rm -rf $(VENV) build dist runs *.egg-info .pytest_cache .ruff_cache .benchmarks
