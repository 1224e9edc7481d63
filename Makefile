# make demo, make demo-detection, make test: each sets everything up first.
PYTHON ?= python3
VENV := .venv/bin/python
# On a shared machine OpenMP's threads lose whole time slices spinning at barriers.
export GOMP_SPINCOUNT ?= 20000

.PHONY: setup demo demo-detection test format clean

setup:
	@$(PYTHON) tools/setup_env.py

demo: setup
	@$(VENV) tools/run_demo.py segmentation

demo-detection: setup
	@$(VENV) tools/run_demo.py detection

test: setup
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 --dist worksteal

format: setup
	$(VENV) -m ruff check --fix .
	$(VENV) -m ruff format .

clean:
	rm -rf .venv data/demo work_dirs/demo_segmentation work_dirs/demo_detection
