# make demo   export the trained checkpoint in four forms, run each, prove the numbers
# make test   lint, types, tests
# Both create .venv if needed and install what they need into it; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
# /dev/null installs the newest of everything that pyproject.toml allows
CONSTRAINTS ?= constraints.txt

.PHONY: demo test test-kernel test-versions lint types pytest docs install clean
.DEFAULT_GOAL := demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt tests/tensorrt-headers.txt tests/tensorrt-lean.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[cpu,hf,kernel,ray,report,rtx,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target $(VENV)/tensorrt-headers -r tests/tensorrt-headers.txt
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --upgrade --target $(VENV)/tensorrt-lean -r tests/tensorrt-lean.txt
	touch $@

demo: install
	$(BIN)/rmsnorm demo -o demo-out

test: lint types pytest

# every kernel that the tests know, as PTX, without a GPU; `make test` runs a sample
test-kernel: install
	RMSNORM_EVERY_KERNEL=1 $(BIN)/python -m pytest -n $(WORKERS) tests/plugins/kernel

# the smoke test with the oldest and with the newest versions of each library, in environments of their own
test-versions:
	PYTHON=$(PYTHON) tests/versions/run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install .typecheck/rmsnorm_deploy
	$(BIN)/mypy

# mypy's view of the packages; under version control, but not in an sdist
.typecheck/rmsnorm_deploy:
	mkdir -p $@
	for name in export models plugins runtime src/rmsnorm_deploy/*; do \
	    case $$name in *__pycache__) ;; *) ln -s ../../$$name $@/$${name##*/} ;; esac; done

# a core for each worker: with more threads than cores, the tests take a fifth longer
pytest: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

# the documentation, in site/; loads nothing from other hosts
docs: $(VENV)/.docs-installed .typecheck/rmsnorm_deploy
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) demo-out build dist site
