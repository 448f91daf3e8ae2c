# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check docs bench bench-matrix soak clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## Train a network on handwritten digits over four replicas; its curves go to out/demo.png
	@mkdir -p out
	$(BIN)/tensorkv demo --out out/demo.png

# Tests start hundreds of interpreters, and each would compile the package and the tests.
test test-all: export PYTHONDONTWRITEBYTECODE :=

# Four tests at a time on two cores: many wait for other processes, and each more costs imports of torch, JAX and Ray.
test: $(STAMP) ## Test every behaviour, and each fault
	$(BIN)/python -m pytest -n 4 --dist worksteal -m "not release" $(PYTEST)

test-all: $(STAMP) ## Test with all repetitions, planted faults and the benchmarks' tests, as before a release
	TENSORKV_TESTS=all $(BIN)/python -m pytest -n 4 --dist worksteal $(PYTEST)

check: docs ## Check format, lint, types, the layers of packages and the documentation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## Build the documentation into out/site; a broken link or docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP) ## Measure one process, processes in lock step, servers, weights and (as root) hosts and compression beside peers; results go to out/bench/
	$(BIN)/python -m benchmarks local --growth --memory $(BENCH)
	$(BIN)/python -m benchmarks sync $(BENCH_SYNC)
	$(BIN)/python -m benchmarks servers $(BENCH_SERVERS)
	$(BIN)/python -m benchmarks weights $(BENCH_WEIGHTS)
	$(BIN)/python -m benchmarks hosts $(BENCH_HOSTS)
	$(BIN)/python -m benchmarks compression $(BENCH_COMPRESSION)

bench-matrix: $(STAMP) ## Measure every form, array library, rule and size on every engine, for hours, into out/bench/
	$(BIN)/python -m benchmarks matrix $(BENCH)

soak: $(STAMP) ## Kill durable stores for MINUTES minutes (10); the report goes to out/soak.json
	$(BIN)/python -m tests.e2e.soak --minutes $(or $(MINUTES),10)

clean: ## Remove caches and outputs; .venv stays
	rm -rf build dist out .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/tensorkv/compiled/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bench,cli,dev,docs,examples,jax,ray]'
	@touch $@
