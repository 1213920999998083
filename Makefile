# Every target installs what it needs into .venv first (seconds when that is done already).
#   make demo ARGS="--corpus DIR"        make test ARGS="-k rmsnorm"
#   make demo PYTHON=python3.12          make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
ARGS ?=
TORCH_INDEX ?=
export TORCH_INDEX
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q

.PHONY: demo test slow fuzz bench lint gpu-check size clean core setup-test setup-lint
.PHONY: native-test native-sanitize native-arm native-avx512

demo: core
	@sh runs/tour.sh $(ARGS)

# Triton is an interpreter or a compiler for a whole process, so its two groups run on their own;
# all three run even when one fails, the largest last.
test: setup-test
	@failed=0; \
	$(PYTEST) -n 2 tests/triton_compile $(ARGS) || failed=1; \
	TRITON_INTERPRET=1 $(PYTEST) -n 2 tests/triton_interpret $(ARGS) || failed=1; \
	$(PYTEST) -n 2 --ignore=tests/triton_compile --ignore=tests/triton_interpret $(ARGS) || failed=1; \
	exit $$failed

slow: setup-test
	@$(PYTEST) -m slow --ignore=tests/triton_compile --ignore=tests/triton_interpret $(ARGS)

# Hostile files for every reader, for as long as one likes.
FUZZ_SECONDS ?= 600
fuzz: setup-test
	@PYTHONPATH=. OMP_NUM_THREADS=1 .venv/bin/python tests/formats/fuzz.py --seconds $(FUZZ_SECONDS) $(ARGS)

# C++ tests of the native core without Python, in every instruction set of this machine.
# (ARGS here and below: words that choose tests by name.)
native-test:
	@sh tests/native/run.sh test $(ARGS)

# The same under the address, undefined-behaviour and thread sanitizers.
native-sanitize:
	@sh tests/native/run.sh sanitize $(ARGS)

# Cross-compiled, on emulated 64-bit Arm processors with and without int8 dot and matrix products;
# needs the Debian packages g++-aarch64-linux-gnu and qemu-user-static. Shows results, not speed.
native-arm:
	@sh tests/native/run.sh arm $(ARGS)

# The AVX-512 files on a machine without AVX-512; needs libsimde-dev. Shows results, not speed.
native-avx512:
	@sh tests/native/run.sh avx512 $(ARGS)

bench: core
	@set -e; for script in bench/*.py; do \
	  case $$script in bench/gpu_*|bench/peer_*|bench/replay.py) continue;; esac; \
	  echo "== $$script"; .venv/bin/python $$script $(ARGS); done

lint: setup-lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

# The machine's own Python where it has torch (a GPU machine often does), else .venv.
gpu-check:
	@if $(PYTHON) -c 'import sys, importlib.util as u; sys.exit(not (u.find_spec("torch") and u.find_spec("triton")))'; \
	then $(PYTHON) bench/gpu_check.py $(ARGS); \
	else $(PYTHON) runs/setup.py test && .venv/bin/python bench/gpu_check.py $(ARGS); fi

size:
	@$(PYTHON) -c 'from endside.size import report; print(report())'

# Leaves .venv; the next target installs into it again.
clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .venv/endside-*.stamp
	find endside tests bench runs reproduce -name __pycache__ -type d -prune -exec rm -rf {} +

core:
	@$(PYTHON) runs/setup.py

setup-test:
	@$(PYTHON) runs/setup.py test

setup-lint:
	@$(PYTHON) runs/setup.py lint
