# Needs Python >= 3.11 and make, nothing else. `make demo` and `make test` set up .venv by themselves; docs/install.md tells the rest.
#   make demo PYTHON=python3.12      another interpreter
#   make setup TORCH_INDEX=<url>     take torch from another wheel index, e.g. PyTorch's CPU index

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH_RANGE := $(shell sed -n 's/^ *"torch\([<>=].*\)",.*/\1/p' pyproject.toml)
TORCH_PIN := $(shell sed -n 's/^torch==/==/p' constraints.txt)

# Exits 0, printing the version, where the interpreter has a torch in the supported range.
FIND_TORCH := from importlib.metadata import version; from pip._vendor.packaging.specifiers import SpecifierSet; \
	found = version("torch"); assert found in SpecifierSet("$(TORCH_RANGE)"); print(found)

.PHONY: demo plans train test test-all lint types unit bench bench-long docs setup clean
.DEFAULT_GOAL := test

demo: plans train
	@echo
	@echo "pictures, to be opened in a browser:"
	@for picture in runs/gpt2/loss.png runs/gpt2/plan.html runs/plan-*/plan.html; do echo "  $$picture"; done

plans: $(READY)
	$(BIN)/python examples/plan_three.py

# On the CPU even where there is a GPU: four ranks need four of them. OMP_NUM_THREADS as in `unit`.
train: export OMP_NUM_THREADS = 1
train: $(READY)
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 4 examples/train_gpt2.py --dp 2 --pp 2 --device cpu

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# One thread per process: WORKERS processes of many threads each would only wait for one another.
# Tests that start several processes themselves run after the others, a file at a time for each worker: those of a file
# share their processes.
unit: export OMP_NUM_THREADS = 1
unit: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not exhaustive and not ranks"
	@if grep -rqs "mark\.ranks" tests; then set -x; $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "ranks and not slow and not exhaustive"; fi

test-all: export OMP_NUM_THREADS = 1
test-all: lint types
	$(BIN)/python -m pytest -m "not exhaustive"

bench: $(READY)
	$(BIN)/python benchmarks/short.py

# Those that take two hours together, or need root. What is known of scaling, whole and line is not measured again.
bench-long: export OMP_NUM_THREADS = 1
bench-long: $(READY)
	$(BIN)/torchrun --nproc-per-node 2 benchmarks/pipeline/main.py --layers 12 --hidden 512 --out benchmarks/pipeline/deep.json
	$(BIN)/python benchmarks/pipeline/slow.py
	$(BIN)/python benchmarks/paced/main.py
	$(BIN)/python benchmarks/tensor_parallel/main.py
	$(BIN)/python benchmarks/scaling/main.py
	$(BIN)/python benchmarks/whole/main.py
	$(BIN)/python -m benchmarks.planner.here
	$(BIN)/python benchmarks/checkpoint/main.py
	$(BIN)/python benchmarks/methods/main.py
	$(BIN)/python -m benchmarks.split.line
	$(BIN)/python benchmarks/tables.py

# The site, in build/docs; its tools are the extra `docs`, installed when first asked for.
docs: $(READY)
	@$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

setup: $(READY)

# torch first and by itself. One that the base interpreter already has is used and never installed over; it is only seen
# through a venv of the base itself, hence the look at sys.prefix. The rest then obeys the pins, and the torch that is there.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"merak_like needs Python >= 3.11, but $(PYTHON) is {v[0]}.{v[1]}: use make PYTHON=...")'
	@test -x $(BIN)/python || if $(PYTHON) -c 'import sys; assert sys.prefix == sys.base_prefix; $(FIND_TORCH)' >/dev/null 2>&1; \
		then echo "using the torch that $(PYTHON) has"; $(PYTHON) -m venv --system-site-packages $(VENV); \
		else $(PYTHON) -m venv $(VENV); fi
	@$(BIN)/python -c '$(FIND_TORCH)' >/dev/null 2>&1 || \
		$(BIN)/python -m pip install --quiet "torch$(TORCH_PIN)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@found=$$($(BIN)/python -c '$(FIND_TORCH)') && sed "s/^torch==.*/torch==$$found/" constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find merak_like tests -name __pycache__ -type d -prune -exec rm -rf {} +
