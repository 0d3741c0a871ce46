# make serve [CONFIG=ray_configs/...yaml]   set up, then serve on this machine until Ctrl-C
# make test  [TESTS=quick|all|rest|parity|stress|fuzz]
#                                           set up, then lint and test: unit tests; what CI runs (where CI is set);
#                                           the further cases that CI leaves out; every model against its unsplit
#                                           pipeline; kills and outages for minutes; 14,000 hostile requests
# make lint, make clean
CONFIG ?= ray_configs/serve_emoji_both_cpu.yaml
TESTS ?= $(if $(CI),all,quick)
TESTS_quick := tests.side_by_side quick
TESTS_all := tests.side_by_side all
TESTS_rest := tests.side_by_side rest
TESTS_parity := pytest tests/parity
TESTS_stress := pytest tests/stress
TESTS_fuzz := pytest -rP tests/fuzz
ifeq ($(filter quick all rest parity stress fuzz,$(TESTS)),)
$(error TESTS must be quick, all, rest, parity, stress or fuzz, got $(TESTS))
endif

VENV := .venv
COMMA := ,
# What the last step of $(VENV)/installed and of $(VENV)/installed-dev installs.
REST_installed := Ray Serve, diffusers and the rest
REST_installed-dev := Ray Serve, diffusers, tools for the tests and the rest
EXTRA_installed-dev := [dev]
# Without bytecode, which takes longer than the download: Python writes that of what it imports, at its first use.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt
LOG := $(VENV)/set-up.log

# $(call step,NUMBER,TEXT,COMMAND): one line with the seconds that the command takes, which count up on a terminal.
# What the command says goes to the log, and its last lines are shown when it fails.
define step
( line="[$(1)/3] $(2) ..."; began=$$(date +%s); seconds() { echo "$$(($$(date +%s) - began)) s"; }; \
	printf '%s ' "$$line"; ticker=; again=; \
	if [ -t 1 ]; then \
		(while sleep 1 && kill -0 $$$$ 2>/dev/null; do printf '\r%s %s' "$$line" "$$(seconds)"; done) & ticker=$$!; \
		again="\r$$line "; \
	fi; \
	{ echo "$$line"; $(3); } >>$(LOG) 2>&1; failed=$$?; \
	if [ -n "$$ticker" ]; then kill $$ticker; wait $$ticker; fi 2>/dev/null; \
	[ $$failed = 0 ] || { printf "$${again}failed after %s\n\n" "$$(seconds)"; tail -n 20 $(LOG); exit 1; }; \
	printf "$$again%s\n" "$$(seconds)" )
endef
CANNOT_INSTALL = { echo; echo "Installing stopped: pip says above why, and all that was said is in $(LOG)."; \
	echo "Often it is the network, a proxy or the disk: mend that and run make again (it goes on where it stopped),"; \
	echo "or start afresh with: make clean"; exit 1; }

.PHONY: serve test lint clean

serve: $(VENV)/installed
	@exec $(VENV)/bin/python -m serve_app.tools.launch $(CONFIG)

# CI lints beside the tests (tests/side_by_side.py).
test: $(if $(filter all,$(TESTS)),$(VENV)/installed-dev,lint)
	@echo "== tests ($(TESTS))"
	@exec $(VENV)/bin/python -m $(TESTS_$(TESTS))

lint: $(VENV)/installed-dev
	@echo "== ruff"
	@$(VENV)/bin/ruff check .
	@echo "== mypy"
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache

# torch first and alone: it is the big one, and nothing installed after it may bring another. pip takes the build of it
# that its own configuration offers; install.py gives uv the same configuration for the rest, or leaves that to pip too.
$(VENV)/installed $(VENV)/installed-dev: pyproject.toml constraints.txt install.py | $(VENV)/bin/pip
	@$(call step,2,torch$(COMMA) the largest download,$(PIP) torch) || $(CANNOT_INSTALL)
	@$(call step,3,$(REST_$(@F)),$(VENV)/bin/python install.py '.$(EXTRA_$(@F))') || $(CANNOT_INSTALL)
	@touch $(VENV)/installed $@

$(VENV)/bin/pip:
	@for python in python3 python3.14 python3.13 python3.12 python3.11 python; do \
		"$$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null || continue; \
		mkdir -p $(VENV); \
		$(call step,1,$(VENV) with $$("$$python" --version),"$$python" -m venv $(VENV)) && exit 0; \
		rm -rf $(VENV); echo; echo "Making $(VENV) failed: see above."; exit 1; \
	done; \
	echo "No Python 3.11 to 3.14 with the venv module was found on the PATH."; \
	echo "Install one and run make again (Debian, Ubuntu: apt-get install python3 python3-venv; macOS: brew install python)."; \
	exit 1
