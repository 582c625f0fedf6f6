# Everything below runs in .venv, which the first target that needs it makes. `make help` lists what there is.

PYTHON ?= python3
DATA ?= ../shared/data
# Branch coverage below this share fails `make test`.
COVERAGE ?= 85

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-clients check format lint typecheck bench bench-gateway bench-routing chaos lock lock-clients wheel

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

chaos: $(STAMP) ## every fault in turn against a gateway under load, then 200 kills (needs redis-server; under ten minutes)
	@command -v redis-server >/dev/null || { \
		echo "make chaos needs redis-server: on Debian and Ubuntu install the package redis-server" >&2; exit 1; }
	$(BIN)/python -m loadtest.chaos

lock: $(STAMP) ## pin what pyproject.toml asks for, with hashes (UPGRADE=--upgrade: the newest of everything)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra encoder --extra otel --extra report --group dev --output-file requirements.lock --quiet $(UPGRADE) \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock"
	$(BIN)/uv pip compile pyproject.toml --extra otel --constraint requirements.lock --quiet --no-annotate \
		--output-file deploy/container/requirements.lock \
		--universal --python-version 3.11 --generate-hashes --no-emit-index-url --custom-compile-command "make lock"

lock-clients: $(STAMP) ## pin the newest of the clients that `make test-clients` tries
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile tests/clients/python/requirements.in --output-file tests/clients/python/requirements.lock --quiet \
		--upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--custom-compile-command "make lock-clients"
	npm --prefix tests/clients/node update --package-lock-only

wheel: $(STAMP) ## build dist/understudy-*.whl
	$(BIN)/python -m build --wheel --no-isolation
