# The two commands of the README (`make demo`, `make test`), and what CI and contributors call.
PYTHON ?= python3
BIN := .venv/bin
MODELS ?= models
RUNS ?= runs

.PHONY: demo test check lint setup bench paper soak clean

demo: setup  ## preflight of a pretrained model on real text, then one unstable run with and without the loop
	$(BIN)/python scripts/real_models.py $(MODELS)
	mkdir -p $(RUNS)
	$(BIN)/rksp probe make $(RUNS)/probe.safetensors --text LICENSE --tokenizer $(MODELS)/smollm2-135m
	$(BIN)/rksp preflight $(MODELS)/smollm2-135m --probe $(RUNS)/probe.safetensors --exit-zero
	rm -rf $(RUNS)/demo
	$(BIN)/rksp demo --output $(RUNS)/demo

test: setup  ## the whole test-suite; what is not installed is reported as skipped
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope

check: lint test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## every figure of the README and the CHANGELOG
	$(BIN)/python benchmarks/profile_cost.py
	$(BIN)/python benchmarks/kreiss.py
	$(BIN)/python benchmarks/control_poll.py
	$(BIN)/python benchmarks/kss_overhead.py
	$(BIN)/python benchmarks/mamba_scan.py
	$(BIN)/python benchmarks/norm_speed.py
	$(BIN)/python benchmarks/checkpoint_bytes.py
	$(BIN)/python benchmarks/scan_cost.py
	$(BIN)/python benchmarks/scrape.py

paper: setup  ## what is cheap of the paper's tables and figures, and docs/paper.md
	$(BIN)/python -m training.experiments.paper
	$(BIN)/python -m training.experiments.paper --render docs/paper.md

soak: setup  ## the watcher's promises at full length: kills, broken files, 5000 checkpoints of 50 runs, faults (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

setup: .venv/.installed

# torch comes from constraints.txt: an open range would pull a build with CUDA, several gigabytes.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,hf,lightning,parquet,trainer]' --constraint constraints.txt
	touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
