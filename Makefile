# The environment lies in .venv. It is made at first use, and again only when pyproject.toml or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
KERNELS := .venv/kernels
# The oldest release of Flower that FedTune is tried on, in an environment of its own that takes all else from .venv.
OLDEST := flwr==1.39.0 cryptography==46.0.7
OTHER := .venv/oldest-flower
# As in the README: without an NVIDIA driver torch's build for CPUs, which brings no CUDA.
TORCH := torch==2.13.0
ifeq ($(shell uname)$(shell command -v nvidia-smi),Linux)
TORCH := --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
endif
# Every node is a process of its own, and would compile all that it imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint audit format config docs wheel bench compare clean

help: ## Show this list.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(INSTALLED) ## Tune a model over a real federation (about 5 minutes; MODEL=smollm2: a real one, 15).
	@$(BIN)/fedtune demo $(if $(MODEL),--model $(MODEL)) $(DEMO)

test: lint audit $(KERNELS) $(OTHER)/installed ## Check everything: style, types, unit tests and networked tests.
	$(if $(TESTS),,HF_HUB_OFFLINE=1 $(OTHER)/bin/python -m pytest -n 2 --dist loadfile -q tests/network -k "equals or security")
	HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 $(BIN)/pytest -n 2 --dist worksteal $(TESTS)

lint: $(INSTALLED) ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(INSTALLED) ## Look for known vulnerabilities in what is pinned, where advisories can be reached.
	@$(PYTHON) .ci/audit.py

format: $(INSTALLED) ## Put the code in style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

config: $(INSTALLED) ## Write the run configuration's defaults into pyproject.toml.
	$(BIN)/fedtune config --write pyproject.toml

docs: $(INSTALLED) ## Build the documentation as a site in site/, with every link checked.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A build folder from before would bring files along that are gone.
wheel: $(INSTALLED) ## Build dist/fedtune-*.whl, its constraints beside it: it installs where no clone is.
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	cp constraints.txt dist/

# Those that need no data; the others say on their first lines how they are called.
bench: $(INSTALLED) ## Measure speed, memory and bytes on this machine.
	@for name in seed_space step round_cost block_step; do \
	  echo "== $$name"; $(BIN)/python "benchmarks/$$name.py" || exit 1; done

compare: $(INSTALLED) ## Run every method and baseline side by side (PROTOCOL=tiny), and write table, plots and page.
	$(BIN)/python benchmarks/compare.py run $(or $(PROTOCOL),tiny)
	$(BIN)/python benchmarks/compare.py report $(or $(PROTOCOL),tiny)

clean: ## Remove the environment, caches and builds. Runs and results in runs/ and out/ stay.
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first: a build that pip finds on this machine is taken before one is fetched.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "FedTune needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing into .venv (a few minutes, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check --no-index --no-deps torch==2.13.0 2>/dev/null || \
	  $(BIN)/pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt $(TORCH)
	@$(BIN)/pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(OTHER)/installed: $(INSTALLED)
	@$(PYTHON) -m venv --clear --without-pip $(OTHER)
	@$(OTHER)/bin/python -c 'import site, sys; print(f"import site; site.addsitedir({sys.argv[1]!r})", \
	  file=open(f"{site.getsitepackages()[0]}/shared.pth", "w"))' "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	@$(BIN)/pip --python $(OTHER)/bin/python install -qq --no-deps --no-compile --disable-pip-version-check $(OLDEST)
	@sed '1s|.*|#!$(CURDIR)/$(OTHER)/bin/python|' $(BIN)/fedtune > $(OTHER)/bin/fedtune && chmod +x $(OTHER)/bin/fedtune
	@touch $@

# The kernels for GPUs are tested in Triton's interpreter, which needs no GPU.
$(KERNELS): $(INSTALLED)
	@$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[gpu]'
	@touch $@
