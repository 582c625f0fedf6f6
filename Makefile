# Everything below runs in .venv, which the first target that needs it makes. `make help` lists what there is.

PYTHON ?= python3
DATA ?= ../shared/data
# Branch coverage below this share fails `make test`.
COVERAGE ?= 85

# PyTorch's build for the CPU, of the version that vLLM was built for. Package indexes have builds for GPUs under the same
# number; where pip doesn't find this one, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS names a place that has it.
TORCH ?= torch==2.13.0+cpu

BIN := .venv/bin
STAMP := .venv/.installed
VLLM := .venv-vllm/bin/python
VLLM_STAMP := .venv-vllm/.installed

.DEFAULT_GOAL := help
.PHONY: help install install-vllm demo test test-vllm test-clients check format lint typecheck bench bench-gateway bench-routing bench-students chaos lock lock-clients lock-vllm wheel

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

install: $(STAMP) ## make .venv with the locked dependencies and the command understudy

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "understudy needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		rm -rf .venv; \
		echo "$(PYTHON) -m venv failed: on Debian and Ubuntu install the package python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP) ## run the main job on example messages, then go on serving on port 8080
	$(BIN)/understudy demo

test: $(STAMP) ## run the tests, with branch coverage; says what it skips
	$(BIN)/python -m pytest -q --cov --cov-branch --cov-report=term --cov-fail-under=$(COVERAGE)

test-vllm: $(STAMP) $(VLLM_STAMP) ## the tests that need a real vLLM or torch: servers, training, export (makes their environment)
	UNDERSTUDY_REQUIRE=vllm,torch $(BIN)/python -m pytest -q -m torch

install-vllm: $(VLLM_STAMP) ## make .venv-vllm: vLLM, torch and transformers for the CPU (4 GB)

# --no-deps: the lock is whole but for what vLLM asks for and can't use here. torchvision, torchaudio and torchcodec come as
# builds for GPUs, which break the import beside torch's build for the CPU; triton and sentence-transformers nobody needs.
$(VLLM_STAMP): deploy/vllm/requirements.lock
	@test -x $(VLLM) || $(PYTHON) -m venv .venv-vllm
	@$(VLLM) -m pip install --quiet --disable-pip-version-check --no-deps "$(TORCH)" || { \
		echo "there is no $(TORCH) where pip looks: PyTorch's site says which index has its builds for the CPU;" \
			"make install-vllm PIP_EXTRA_INDEX_URL=..." >&2; exit 1; }
	$(VLLM) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r deploy/vllm/requirements.lock
	@touch $(VLLM_STAMP)

test-clients: $(STAMP) ## other people's clients through the gateway, in Python and Node; fetches them (not part of `make test`)
	@node --version >/dev/null 2>&1 && npm --version >/dev/null 2>&1 || { \
		echo "make test-clients needs node (20 or newer) and npm: install them, for example from nodejs.org" >&2; exit 1; }
	@test -x .venv-clients/bin/python || $(BIN)/python -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
		-r tests/clients/python/requirements.lock
	npm --prefix tests/clients/node ci --silent
	PYTHONPATH=. $(BIN)/python tests/clients/run.py

check: $(STAMP) ## see to format, lint, import contracts and types, and change nothing
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory lint typecheck

format: $(STAMP) ## format the code and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(STAMP) ## ruff, and which way imports go
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

typecheck: $(STAMP) ## mypy, strict
	$(BIN)/mypy

bench: $(STAMP) ## HTTP clients on the way to the teacher, side by side (half a minute)
	$(BIN)/python -m loadtest.clients

bench-gateway: $(STAMP) ## requests a second through a gateway on one core, by the way they take (a minute; AGAINST=another checkout)
	$(BIN)/python -m loadtest.throughput $(if $(AGAINST),--against $(AGAINST)) \
		$(if $(wildcard $(DATA)/banking77_gpt4/stream.csv),--recording $(DATA)/banking77_gpt4/stream.csv)

bench-routing: $(STAMP) ## whether the promise is kept, and what it costs: every table (DATA=folder with the recordings, ONLY=validity)
	@test -f $(DATA)/banking77_gpt4/stream.csv || { \
		echo "no recording at $(DATA)/banking77_gpt4/stream.csv: make bench-routing DATA=folder" \
			"(where it comes from: docs/lab-notes.md)" >&2; exit 1; }
	$(BIN)/python -m loadtest.routing $(DATA) $(if $(ONLY),--only $(ONLY))

bench-students: $(STAMP) ## every kind of student on the same traffic, side by side (DATA=folder with the recordings, ONLY=linear, SEEDS=3)
	@test -f $(DATA)/banking77_gpt4/stream.csv || { \
		echo "no recording at $(DATA)/banking77_gpt4/stream.csv: make bench-students DATA=folder" \
			"(where it comes from: docs/lab-notes.md)" >&2; exit 1; }
	$(BIN)/python -m loadtest.students $(DATA)/banking77_gpt4 $(if $(ONLY),--only $(ONLY)) $(if $(SEEDS),--seeds $(SEEDS))

chaos: $(STAMP) ## every fault in turn against a gateway under load, then 200 kills (needs redis-server; under ten minutes)
	@command -v redis-server >/dev/null || { \
		echo "make chaos needs redis-server: on Debian and Ubuntu install the package redis-server" >&2; exit 1; }
	$(BIN)/python -m loadtest.chaos

lock: $(STAMP) ## pin what pyproject.toml asks for, with hashes (UPGRADE=--upgrade: the newest of everything)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra encoder --extra otel --extra report --group dev --output-file requirements.lock --quiet $(UPGRADE) \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
	$(BIN)/uv pip compile pyproject.toml --extra encoder --extra otel --constraint requirements.lock --quiet --no-annotate \
		--output-file deploy/container/requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock"

lock-clients: $(STAMP) ## pin the newest of the clients that `make test-clients` tries
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile tests/clients/python/requirements.in --output-file tests/clients/python/requirements.lock --quiet \
		--upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock-clients"
	npm --prefix tests/clients/node update --package-lock-only

lock-vllm: $(STAMP) ## pin what `make install-vllm` installs beside torch (UPGRADE=--upgrade: the newest of everything)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile deploy/vllm/requirements.in --excludes deploy/vllm/excludes.txt --output-file deploy/vllm/requirements.lock \
		--quiet $(UPGRADE) --no-annotate --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock-vllm"

wheel: $(STAMP) ## build dist/understudy-*.whl
	$(BIN)/python -m build --wheel --no-isolation
