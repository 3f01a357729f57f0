# The project's commands; `make help` lists them.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test bench bench-owners bench-streams fuzz check soak faults rolling many format models quality quality-anomaly presets image image-check lock clean

# PYTHON: the interpreter that makes .venv; found by scripts/find-python.sh where it is not named.
PYTHON ?=
HOST = $(or $(HOURGLASS_HOST),127.0.0.1)
PORT = $(or $(HOURGLASS_PORT),8000)
IMAGE = hourglass

python = .venv/bin/python
# Where this machine reaches the service, also when it listens on every interface.
address = http://$(if $(filter 0.0.0.0 ::,$(HOST)),127.0.0.1,$(HOST)):$(PORT)

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-15s %s\n", $$1, $$2 }'

setup: .venv/.installed  ## Make .venv with all that running, training and testing need (PYTHON=python3.12 to choose)

# The stamp is made last, so an interrupted installation is taken up again, and an old one when a file here is newer.
.venv/.installed: pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(python) -m pip --version >/dev/null 2>&1; then \
		found=$$(sh scripts/find-python.sh $(PYTHON)) || exit 1; \
		echo "Making .venv with $$found"; \
		"$$found" -m venv --clear .venv || exit 1; \
	fi
	@echo "Installing into .venv; the first time it downloads torch, about 3 GB on Linux."
	@$(python) -m pip install --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $@

run: setup  ## Serve models_store/ on 127.0.0.1:8000 (PORT=9000, HOST=0.0.0.0)
	@echo "Hourglass on $(address), its documentation on $(address)/docs. In another terminal:"
	@echo "  curl -F file=@examples/digit-7.png $(address)/anomaly-score"
	@echo "  curl -F file=@examples/digit-7.png -H 'Accept: image/png' -o reconstruction.png $(address)/reconstruct"
	@exec $(python) -m app serve --host $(HOST) --port $(PORT)

test: setup  ## Run the test suite (real digits where HOURGLASS_DATA_ROOT holds MNIST)
	@$(python) -m pytest

check: setup  ## What CI runs: format, lint, types, import contracts, tests
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m mypy
	@.venv/bin/lint-imports
	@$(MAKE) --no-print-directory test

bench: setup  ## Measure this service against its peers, 15 minutes or so (BENCH_FLAGS=--help)
	@$(python) -m benchmarks $(BENCH_FLAGS)

bench-owners: setup  ## A replica of the model in every HTTP process against one owner of the device, 2 minutes or so
	@$(python) -m benchmarks.owners

soak: setup  ## 1 000 reloads under 64 clients, memory beside a bare loop of torch (RELOADS=200)
	@RELOADS=$(or $(RELOADS),1000) $(python) -m pytest tests/app/test_reloads.py

faults: setup  ## Put faults in and print how long everyone in flight waited for an answer
	@ANSWERED_WITHIN_S=1 $(python) -m pytest tests/app/api/test_faults.py

rolling: setup  ## 50 rolling restarts of two replicas behind nginx, under 64 clients (RESTARTS=10)
	@RESTARTS=$(or $(RESTARTS),50) $(python) -m pytest tests/app/test_lifecycle.py -k rolling

many: setup  ## 200 artifacts served for a minute from memory for 20 of them (MODELS=, SECONDS=)
	@MODELS=$(or $(MODELS),200) SECONDS=$(or $(SECONDS),60) $(python) -m pytest tests/app/test_lifecycle.py -k many

bench-streams: setup  ## Memory of a stream of 100 000 items, what leaving clients hold; JSON and binary tensors against FastAPI
	@$(python) -m benchmarks.streams $(BENCH_FLAGS)

fuzz: setup  ## Try every route of the served OpenAPI document with schemathesis (FUZZ_EXAMPLES=50)
	@PYTHON=$(python) sh scripts/fuzz.sh

format: setup  ## Format the code and repair what the linter can
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

models: setup  ## Train the shipped artifacts of models_store/ anew
	@$(python) -m training models

quality: setup  ## Measure on MNIST what the presets reach, into docs/quality.md (PART=denoising; hours for all, resumable)
	@$(python) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quality]'
	@OMP_NUM_THREADS=1 $(python) -m quality $(PART)

quality-anomaly: setup  ## Measure anomaly scores on MNIST and drawn surfaces, into docs/quality-anomaly.md (PART=surfaces; resumable)
	@OMP_NUM_THREADS=1 $(python) -m quality.anomaly $(PART)

presets: setup  ## Train every preset on every kind of data for MINUTES=1, verify and serve each, 45 minutes or so
	@OMP_NUM_THREADS=1 $(python) -m quality.every_preset $(or $(MINUTES),1)

image:  ## Build the serving image with Docker (IMAGE=name)
	docker build --tag $(IMAGE) .

image-check:  ## Build the image with buildah, no engine needed, and try it (BASE_IMAGE=, BUILDAH_FLAGS=)
	@bash scripts/verify-image.sh

lock:  ## Write constraints.txt anew from the ranges of pyproject.toml (Python 3.11)
	@PYTHON="$(PYTHON)" sh scripts/lock.sh

clean:  ## Remove .venv, caches and build products; models, data and runs stay
	rm -rf .venv .bench build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
	find app training benchmarks tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
