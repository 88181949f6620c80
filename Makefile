# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
.PHONY: serve bench test browser check slow

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $(STAMP)

serve: $(STAMP)
	exec $(BIN)/taps serve serve_config.yaml

# Asks the server that `make serve` runs; more options: make bench BENCH="--peer vllm=http://127.0.0.1:8100"
bench: $(STAMP)
	$(BIN)/python -m cluster.bench --quick $(BENCH)

# The page is tried in a real browser where Chromium's driver is installed.
test: SERVED := serve$(if $(shell command -v chromedriver), or browser)
test: $(STAMP)
	$(BIN)/taps prepare
	$(BIN)/python -m pytest -m "not serve and not slow and not browser" -n 2 --dist loadscope
	$(BIN)/python -m pytest -m "$(SERVED)"

# The page alone, in a real browser: needs Chromium and its driver.
browser: $(STAMP)
	$(BIN)/taps prepare
	$(BIN)/python -m pytest -m browser

slow: $(STAMP)
	$(BIN)/taps prepare
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
