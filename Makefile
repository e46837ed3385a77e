# make demo    set-up, the main job on the embedded default, its pictures
# make test    set-up, the tests
# make test-triton  set-up, Triton (Linux, 200 MB), the checks of the GPU's kernels without a GPU
# make test-store   set-up, a local S3 server (40 MB), the checks of caches at a URL against it
# make test-browser set-up, Playwright and Chromium, the checks of report.html in a browser
# make test-tracking  set-up, the trackers' packages (100 MB), the checks of what they are told
# make test-clusters  set-up, Ray and submitit, the checks of executors for many machines
# make test-peers   set-up, the peers' environment, the checks against the peers themselves
# make peers   the environment of the packages that benchmarks/ compares with
# make bench   set-up, every benchmark in full (about half an hour); BENCH=--quick for a smoke run
.PHONY: setup demo test test-slow test-triton test-store test-browser test-tracking test-clusters \
	test-peers check clusters peers bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= run_1

setup: $(VENV)/.ready

# torch first and pinned: an unpinned resolution may fetch gigabytes of CUDA packages.
$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("saelab needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	@if [ -e $(RUN)/final_info.json ]; then echo "$(RUN) is complete: its pictures are drawn again (rm -r $(RUN) to train again)"; \
	else $(BIN)/python experiment.py --out_dir=$(RUN); fi
	$(BIN)/python plot.py
	@echo "results: $(RUN)/summary.md and $(RUN)/final_info.json; pictures: $(RUN)_*.png in this folder"

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow -n 2

test-triton: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt triton
	$(BIN)/python -m pytest tests/kernels/test_gpu_kernels.py

test-store: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[store-tests]'
	$(BIN)/python -m pytest tests/stores

# Debian's Chromium where none is there: Playwright's own is not on any registry of packages.
test-browser: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,browser]'
	command -v chromium >/dev/null \
		|| (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium) \
		|| echo "no chromium can be installed here: the browser's tests are skipped"
	$(BIN)/python -m pytest tests/browser

test-tracking: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tracking]'
	$(BIN)/python -m pytest tests/progress/test_trackers.py

clusters: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray,slurm]'

test-clusters: clusters
	$(BIN)/python -m pytest tests/e2e/test_clusters.py

test-peers: setup peers
	SAELAB_PEERS=benchmarks/.peers/bin/python $(BIN)/python -m pytest -m peers

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

peers: benchmarks/.peers/.ready

benchmarks/.peers/.ready: benchmarks/peers.txt constraints.txt
	$(PYTHON) benchmarks/peers.py
	touch $@

bench: setup peers
	for name in train_step launch harvest probing synthetic_parity evaluations memory scaling penalty \
			telling trace soak; do \
		$(BIN)/python benchmarks/$$name.py $(BENCH) || exit 1; \
	done

clean:
	rm -rf $(VENV) benchmarks/.peers build dist *.egg-info
