# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Ray would look for a cluster at the address that the last one left, also when that was killed; it would run its
# workers at niceness 15, and Serve's controller look at everything ten times a second.
RAY_ADDRESS ?= local
RAY := RAY_ADDRESS=$(RAY_ADDRESS) RAY_worker_niceness=0 RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.5

.PHONY: serve bench test check slow

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

serve: $(STAMP)
	$(BIN)/taps prepare
	$(RAY) exec $(BIN)/python -m cluster.haproxy $(BIN)/serve run serve_config.yaml

# Asks the server that `make serve` runs; more options: make bench BENCH="--peer vllm=http://127.0.0.1:8100"
bench: $(STAMP)
	$(BIN)/python -m cluster.bench --quick $(BENCH)

test: $(STAMP)
	$(BIN)/taps prepare
	$(BIN)/python -m pytest -m "not serve and not slow" -n 2
	$(BIN)/python -m pytest -m serve

slow: $(STAMP)
	$(BIN)/taps prepare
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
