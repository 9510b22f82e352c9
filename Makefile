# make demo   videos -> flow -> records -> two stages -> evaluation -> report, in runs/demo
# make test   the whole test suite
# make test-slow  the checks that are too long for it
# make test-beam  preparation on Apache Beam, in an environment of its own (.venv-beam)
# make browser    Chromium for the tests of the report in a browser, which are skipped without it
# make check  lint, formatting and types
# make install EXTRAS=cuda12   the GPU build of JAX instead of the CPU one
# make install EXTRAS=bench    PyTorch too, for experiments/bench and the tests against it
#
# Each target does all the set-up it needs. A second call starts in seconds.

PYTHON ?= python3.11
EXTRAS ?=
BIN := .venv/bin
comma := ,
# Set-up is redone when one of these changes; the stamp's name remembers the extras.
STAMP := .venv/.installed$(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))

.PHONY: install demo test test-slow test-beam browser check clean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --editable '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	touch $@

# With EXTRAS set earlier, plain `make demo` must not install anything else over it.
READY := $(if $(wildcard .venv/.installed*),$(firstword $(wildcard .venv/.installed*)),$(STAMP))

.venv/.installed%: pyproject.toml constraints.txt
	$(MAKE) install EXTRAS=$(subst -,$(comma),$(patsubst -%,%,$*))

demo: $(READY)
	$(BIN)/python -m stf_jax.main --config=configs/demo.py --workdir=runs/demo

# Two processes, however many cores: each holds JAX and TensorFlow, about 3 GB at the most.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# tfds, on the older protobuf that Beam needs, warns of a method that is going to go.
test-beam: .venv-beam/.installed
	.venv-beam/bin/python -m pytest -W "ignore:label() is deprecated:DeprecationWarning" \
	  tests/test_prepare_script.py tests/test_records.py

.venv-beam/.installed: pyproject.toml constraints-beam.txt
	test -x .venv-beam/bin/python || $(PYTHON) -m venv .venv-beam
	.venv-beam/bin/python -m pip install --quiet --constraint constraints-beam.txt \
	  --editable '.[dev,beam]'
	touch $@

# Apt checks signatures as a user that may not write to every machine's /tmp.
browser:
	@if command -v chromedriver && command -v chromium; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "make browser knows Debian's apt-get only: install Chromium and its chromedriver" \
	    "yourself, so that both are on the PATH" >&2; exit 1; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	  echo "Chromium is not there, and installing it takes root: sudo make browser" >&2; exit 1; fi; \
	export TMPDIR=/var/tmp DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq && apt-get install -y -qq --no-install-recommends \
	  chromium chromium-driver fonts-dejavu-core

check: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-beam runs data records
