# Everything is explained by `make help`.
.DEFAULT_GOAL := help
PY := .venv/bin/python
IMAGE ?= netra:local
WORKERS ?= 2

.PHONY: help bootstrap run demo up down test prove-tokens prove-record prove-runs prove-isolation prove-sandbox wire check protos bench image clean reset doctor

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bootstrap:
	@scripts/bootstrap.sh

run: bootstrap ## everything on this machine, one analysis as proof, then serve until Ctrl-C
	@exec $(PY) -m standalone run

demo: bootstrap ## the same, and exit after the proof
	@exec $(PY) -m standalone demo

up: ## everything in containers (docker compose), and what to do next
	@scripts/up.sh

down: ## stop the containers; the data stays
	docker compose down

test: bootstrap ## unit, integration, system: in containers if a Docker engine answers, else on this machine (NETRA_BACKEND chooses)
	@$(PY) -m tests.launch -n $(WORKERS)

prove-tokens: bootstrap ## hostile tokens against running services, over gRPC, HTTP and WebSocket; the last line is JSON
	@$(PY) -m tests.prove.tokens

prove-record: bootstrap ## the record under load and faults, MINUTES=1 of them (FAULTS, SEED); the last line is JSON
	@$(PY) -m tests.prove.record

prove-runs: bootstrap ## runs while every process dies, fairness, cancels, rolling restarts (MINUTES, VOLLEYS, USERS, RUNS, NOISE ...); the last line is JSON
	@$(PY) -m tests.prove.runs

prove-isolation: bootstrap ## every RPC, route, frame and stream with the ids of another user, quiet and during faults (MINUTES, FAULTS); the last line is JSON
	@$(PY) -m tests.prove.isolation

prove-sandbox: bootstrap ## all attacks on all tiers of enforcement, as root and as a normal user, and calls ended (TIERS, ENDINGS); the last line is JSON
	@$(PY) -m tests.prove.sandbox

wire: bootstrap ## the gateway against RFC 6455, case by case, as a table
	@$(PY) -m tests.wire

check: bootstrap ## format, lint, types, import rules, protos
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache
	scripts/buf.sh lint protos
	scripts/protos.sh --check

protos: bootstrap ## regenerate the stubs
	scripts/protos.sh

bench: bootstrap ## measurements, with the peers; at the end a table of them all
	@$(PY) -m bench.harness.every bench/*.py

image: ## the one image
	docker build --tag $(IMAGE) .

clean: ## remove caches, build results and tools (not the data: see reset)
	rm -rf .venv .tools build dist .grimp_cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .coverage coverage.xml
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

reset: bootstrap ## stop and delete .netra with all data (FORCE=1 does not ask)
	@$(PY) -m standalone reset $(if $(FORCE),--force)

doctor: bootstrap ## look for problems on this machine, each with its remedy
	@$(PY) -m standalone doctor
