# The one place that says how the project is built, tested and checked. `make help` lists it.
SHELL := bash
.DELETE_ON_ERROR:

VENV ?= .venv
LOCK ?= requirements/dev.txt
PYTHON ?= $(shell python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo python3 || .ci/pythons | tail -n 1 | cut -d ' ' -f 2)
ARGS ?=
# Processes that run the tests; they wait for databases more than they compute.
WORKERS ?= 4
# Groups of programs that must hold.
CONTRACT ?= ../shared/typing/check.py
CONTRACT_GROUPS ?= core units tasks models

bin := $(VENV)/bin
# One cache for each environment: what mypy knows of SQLAlchemy 2.0 is not true of 2.1.
export MYPY_CACHE_DIR := $(abspath $(VENV))/mypy-cache
sources := $(shell find src typings -not -name '*.pyc' 2>/dev/null)
typed := $(wildcard typing_tests tests examples benchmarks campaign website)

.PHONY: help
help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: venv
venv: $(VENV)/.installed ## make .venv: the locked dependencies and the package's wheel (PYTHON=python3.13 to choose)

# pip installs uv alone, by its hashes in the lock; uv installs the rest in a fraction of pip's time.
$(VENV)/.locked: $(LOCK)
	@"$(or $(PYTHON),python3)" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "No Python >= 3.11 that can make a virtual environment was found ($(or $(PYTHON),python3))."; \
		echo "Install one (on Debian and Ubuntu: apt-get install python3-venv), or name it: make venv PYTHON=/path/to/python3"; \
		exit 1; } >&2
	"$(PYTHON)" -m venv --clear $(VENV)
	@awk '/^uv==/ { found = 1 } found && /# via/ { exit } found' requirements/dev.txt > $(VENV)/uv.txt
	$(bin)/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	$(bin)/uv pip install --quiet --system-certs --compile-bytecode --python $(bin)/python --require-hashes -r $(LOCK)
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml README.md LICENSE $(sources)
	rm -rf $(VENV)/wheel
	$(bin)/python -m build --wheel --no-isolation --outdir $(VENV)/wheel > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	$(bin)/python -m pip install --quiet --quiet --disable-pip-version-check --no-deps --force-reinstall $(VENV)/wheel/*.whl
	@touch $@

.PHONY: test
test: venv ## run the tests against the installed wheel, some ten minutes on two cores (ARGS="-k name" for some)
	$(bin)/pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

# A few files of each storey that tell most; with the slow tests left out they take less than a minute on two cores.
QUICK ?= tests/test_architecture.py $(addprefix tests/, \
	web/test_request.py web/test_request_tail.py web/test_dependency.py web/test_lifespan.py \
	cluster/test_read_only_pair.py tasks/test_transactional.py tasks/test_gather.py \
	unit/test_unit.py unit/test_hooks_around.py unit/test_isolation_level.py \
	session/test_sessions.py dialects/test_conflicts.py arguments/test_options.py \
	project/test_typing.py project/test_exceptions.py)

.PHONY: quick
quick: venv ## run the tests that tell most, within a minute (ARGS as for make test)
	$(bin)/pytest --numprocesses $(WORKERS) --dist worksteal -m "not slow" $(QUICK) $(ARGS)

.PHONY: test-servers
test-servers: venv ## deploy on uvicorn, gunicorn, hypercorn and granian, in a minute (ARGS as above)
	$(bin)/pytest -m servers $(ARGS) tests/guides

.PHONY: test-cluster
test-cluster: venv ## lose leaders and nodes of clusters, some six minutes; needs etcd, haproxy and Galera (ARGS as above)
	$(bin)/pytest -m cluster $(ARGS) tests/failover

# Each prints what to try, and examples/README.md says what it shows.
examples := $(filter-out __init__,$(patsubst examples/%.py,%,$(wildcard examples/*.py))) \
	$(patsubst examples/%/__main__.py,%,$(wildcard examples/*/__main__.py))

.PHONY: example
example: $(if $(filter $(NAME),$(examples)),venv) ## run an example: NAME=streaming; without a name, list them
	$(if $(filter $(NAME),$(examples)),,$(error Choose an example, such as NAME=streaming: $(sort $(examples))))
	$(bin)/python -W ignore -m examples.$(NAME) $(ARGS)

# The demo has a small separate environment, so that a newcomer does not wait for what the tests need.
.PHONY: demo
demo: ## serve a small bank and a page that draws each request's transaction
	+@$(MAKE) --no-print-directory demo-served VENV=$(VENV)/demo LOCK=requirements/demo.txt

.PHONY: demo-served
demo-served: $(VENV)/.installed
	$(bin)/python -m examples.demo

.PHONY: demo-screenshot
demo-screenshot: venv ## draw docs/demo.png and docs/demo-dark.png again, by the chromium of the PATH
	$(bin)/python -m tests.support.demo

.PHONY: bookshop
bookshop: venv ## run the bookshop: databases, Redis, worker and web server (ARGS=--replica for a standby as well)
	$(bin)/python -W ignore -m examples.bookshop $(ARGS)

.PHONY: cluster
cluster: venv ## start three PostgreSQL under Patroni and an application, until Ctrl-C (ARGS=--haproxy)
	$(bin)/python -W ignore -m examples.cluster $(ARGS)

.PHONY: cluster-kill
cluster-kill: ## kill the leader of that cluster
	$(bin)/python -m examples.cluster.kill

.PHONY: check
check: lint types test ## everything: lint, types, test

.PHONY: bench
bench: venv ## measure beside hand-written floors, some five minutes (ARGS=--quick, or --docs for the documentation)
	$(bin)/python -W ignore -m benchmarks $(ARGS)

.PHONY: compare
compare: venv ## play the same scenarios with other packages, some six minutes (ARGS=--docs for the documentation)
	$(bin)/python -W ignore -m benchmarks.field $(ARGS)

.PHONY: campaign
campaign: venv ## look for lost writes while everything breaks, some three minutes (ARGS="--seed 7", or --help)
	$(bin)/python -W ignore -m campaign $(ARGS)

.PHONY: site
site: venv ## build the documentation as a site into build/site; what is broken fails
	$(bin)/python -m website

.PHONY: docs-serve
docs-serve: venv ## serve the site at http://localhost:8000, and follow changes of its pages
	$(bin)/python -m website --serve

.PHONY: lint
lint: venv ## ruff: rules and format; codespell
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/codespell

# Two runs of mypy: `src` reads the bodies, everything else reads the stubs; and a third as a user's, with the wheel,
# of the documentation's programs (asyncpg has no types). The last line asks what users see: outside the repository,
# where pyright finds the wheel by the first interpreter of the PATH.
.PHONY: types
types: venv ## mypy and pyright, both strict; the stubs against the installed package; nothing public untyped
	$(bin)/mypy src
	$(bin)/mypy typings $(typed)
	$(bin)/pyright --pythonpath $(bin)/python
	$(bin)/python -m tests.support.pages $(VENV)/pages
	$(bin)/mypy --config-file= --strict --disable-error-code import-untyped $(VENV)/pages/*.py
	$(bin)/python -m mypy.stubtest fastapi_async_sqlalchemy --mypy-config-file pyproject.toml --allowlist stubtest-allowlist.txt
	cd "$$(mktemp -d)" && PATH="$(abspath $(bin)):$$PATH" pyright --ignoreexternal --verifytypes fastapi_async_sqlalchemy

.PHONY: dist
dist: ## build dist/*.whl and dist/*.tar.gz, check both, and write build/sbom.cdx.json
	+$(MAKE) --no-print-directory dist-checked VENV=$(VENV)/dist LOCK=requirements/dist.txt

# The wheel is built from the sdist, so that a distributor can do the same. The bill of materials lists what the
# package and its extras ran with in the tests: a wheel of pure Python holds nothing of others.
shipped := $(VENV)/shipped
.PHONY: dist-checked
dist-checked: $(VENV)/.locked
	rm -rf dist build
	$(bin)/python -m build --no-isolation
	$(bin)/twine check --strict dist/*
	$(bin)/check-wheel-contents dist/*.whl
	$(bin)/uv venv --quiet --clear --python $(bin)/python $(shipped)
	$(bin)/uv pip install --quiet --python $(shipped) --constraint requirements/dev.txt --all-extras -r pyproject.toml
	$(bin)/uv pip install --quiet --python $(shipped) --no-deps dist/*.whl
	$(shipped)/bin/python -I -c 'import fastapi_async_sqlalchemy'
	sed "s/^dynamic = .*/version = \"$$($(bin)/hatchling version)\"/" pyproject.toml > $(shipped)/pyproject.toml
	mkdir -p build
	$(bin)/cyclonedx-py environment --output-reproducible --pyproject $(shipped)/pyproject.toml --mc-type library \
		--output-file build/sbom.cdx.json $(shipped)/bin/python

.PHONY: typing-contract
typing-contract: venv ## programs beside the repository that must type-check, and mistakes that must not
	@if [ -f $(CONTRACT) ]; then $(bin)/python $(CONTRACT) $(CONTRACT_GROUPS); else echo "no typing contract at $(CONTRACT)"; fi

.PHONY: test-matrix
test-matrix: venv ## tests on the oldest and newest Python, SQLAlchemy 2.0, the lowest dependencies; types but on the last
	.ci/matrix

lock-only := $(bin)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url
compile := $(lock-only) --all-extras pyproject.toml
UPGRADE ?=

.PHONY: lock
lock: $(VENV)/.locked ## pin requirements/*.txt again after a change of dependencies (UPGRADE=--upgrade for newer ones)
	$(compile) requirements/dev.in requirements/guides.in $(UPGRADE) -o requirements/dev.txt
	{ echo "# The lower bounds of pyproject.toml, exactly; everything else as in dev.txt. Made by make lock."; \
		$(bin)/uv pip compile --quiet --python-version 3.11 --resolution lowest-direct --no-deps --no-header \
		--no-annotate --no-emit-index-url --all-extras pyproject.toml; } > requirements/lowest.in
	for name in lowest sqlalchemy-2.0; do cp requirements/dev.txt requirements/$$name.txt; done
	$(compile) requirements/dev.in requirements/lowest.in -o requirements/lowest.txt
	$(compile) requirements/{dev,guides,sqlalchemy-2.0}.in -o requirements/sqlalchemy-2.0.txt
	$(lock-only) requirements/dist.in --constraint requirements/dev.txt $(UPGRADE) -o requirements/dist.txt
	$(lock-only) --extra sqlite pyproject.toml requirements/demo.in --constraint requirements/dev.txt \
		-o requirements/demo.txt
