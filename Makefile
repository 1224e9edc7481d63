# make demo, make demo-detection, make test, make test-openmmlab: each installs what it needs first.
PYTHON ?= python3
BIN := .venv/bin
# On a shared machine, threads of OpenMP that wait should leave their core soon.
export GOMP_SPINCOUNT ?= 1000
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: gpu setup demo demo-detection families lint test test-slow test-openmmlab test-browser docs docs-serve format clean

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@$(BIN)/python tools/run_demo.py segmentation

demo-detection: setup
	@$(BIN)/python tools/run_demo.py detection

families: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tools/config_families.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m 'not slow and not browser'

test-slow: setup
	$(PYTEST) -m 'slow and not browser'

# What needs a later torch than OpenMMLab's packages were made for is left out.
test-openmmlab:
	@$(PYTHON) tools/setup_env.py openmmlab
	OMP_NUM_THREADS=1 .venv-openmmlab/bin/python -m pytest -n 2 --dist worksteal -m 'not slow and not dev_stack and not browser' \
		--ignore=tests/models/test_compile.py --ignore=tests/ops \
		--ignore=tests/apis/export --ignore=tests/examples

# overlock serve, and an exported model, in a real browser.
test-browser: setup
	@command -v chromium > /dev/null || { echo "Chromium is not installed; run: apt-get install chromium"; exit 1; }
	@command -v npm > /dev/null || { echo "npm is not installed; it comes with Node.js"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/apis/test_serve_browser.py tests/examples

# What needs a GPU; torch, timm, pytest and this package are enough.
gpu:
	python -m pytest --noconftest -m gpu tests/gpu

# The documentation as a site in site/; a broken link is an error.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-openmmlab site data/demo work_dirs/demo_segmentation work_dirs/demo_detection
