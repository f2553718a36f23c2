# Everything a developer runs. `make` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
CONSTRAINTS := requirements/constraints.txt
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# Extra arguments for pytest, as in `make test ARGS="-k philox -x"`.
ARGS ?=
# A file of tests stays in one process; threads that wait for others leave the cores to them.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(abspath $(RUN)) -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment demo test lint format typecheck build native sanitize sanitize-threads fuzz
.PHONY: noise-statistics docs bench matrix gpu-check sdist wheel wheels reproducible clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Pure Python here, because `native` and `build` put the module in place and show their work.
INSTALL := MMBAL_PURE_PYTHON=1 $(RUN) -m pip install -q --no-compile --no-build-isolation \
    -c $(CONSTRAINTS) -e

# One call of pip for what the targets below would install one after the other.
EXTRAS := demo dist docs lint test
environment: $(VENV)/.has-build ## everything that the targets need, into .venv at once
	$(INSTALL) ".[$$(echo $(EXTRAS) | tr ' ' ,)]"
	touch $(EXTRAS:%=$(VENV)/.has-%)

demo: $(VENV)/.has-demo native ## what balances colored digits and what does not, a few minutes
	$(BIN)/mmbal-fast demo

test: $(VENV)/.has-test build ## the whole test-suite
	$(PYTEST) $(ARGS)

lint: $(VENV)/.has-lint typecheck ## style of Python, C++ and workflows, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/actionlint
	$(BIN)/zizmor --quiet --offline --pedantic .github

format: $(VENV)/.has-lint ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

typecheck: $(VENV)/.has-lint ## mypy --strict
	$(BIN)/mypy

# Both are incremental: what a touched file is part of compiles again.
native: $(VENV)/.has-build
	$(RUN) setup.py --quiet build_ext --inplace

build: $(VENV)/.has-build ## the native module in place, and its emulated CUDA twin for the tests
	MMBAL_BUILD_EMULATED=1 $(RUN) setup.py --quiet build_ext --inplace

# In a copy of the tree, so that the modules of `make build` stay as they are. Python itself is not
# instrumented: the sanitizer's runtime is loaded first, and its leaks are not ours. Reports go past
# pytest to the terminal.
define sanitized-copy
	mkdir -p build/$@
	rm -rf $(addprefix build/$@/,mmbal_fast csrc cmake tests benchmarks)
	cp -Rp mmbal_fast csrc cmake tests benchmarks CMakeLists.txt setup.py pyproject.toml README.md \
	    LICENSE build/$@
	find build/$@/mmbal_fast build/$@/tests -name '*.so' -delete
	cd build/$@ && MMBAL_CPU_ONLY=1 MMBAL_WERROR=1 MMBAL_BUILD_EMULATED=1 \
	    MMBAL_SANITIZE=$(SANITIZER) $(abspath $(RUN)) setup.py --quiet build_ext --inplace
endef
library = $$($${CXX:-c++} -print-file-name=$(1).so)

# Sanitizers see nothing of the reference, and nothing new where torch compiles or imports, or where
# several emulated blocks should run at a time: under them it is one. No test needs the rest of its file.
SANITIZE_TESTS ?= tests/functional --dist worksteal -k "not reference and not compile and not opcheck \
    and not imported_twice and not (one_launch and blocks and not seed)"
sanitize: SANITIZER := address,undefined
sanitize: $(VENV)/.has-test ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(sanitized-copy)
	cd build/$@ && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="$(call library,libasan) $(call library,libstdc++)" \
	    $(PYTEST) -p no:cacheprovider --capture=sys $(SANITIZE_TESTS) $(ARGS)

# Planted races are caught in tests/emulation.
sanitize-threads: SANITIZER := thread
sanitize-threads: $(VENV)/.has-test ## races of the CUDA kernels, emulated under ThreadSanitizer
	$(sanitized-copy)
	cd build/$@ && PYTHONPATH=. TSAN_OPTIONS=halt_on_error=1 MMBAL_DISABLE_NATIVE=1 MMBAL_EMULATION_SEED=1 \
	    OMP_NUM_THREADS=1 LD_PRELOAD="$(call library,libtsan)" \
	    $(abspath $(RUN)) benchmarks/gpu_check.py --part small_set --backend cuda-emulated

FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.has-test build ## every public operation on drawn arguments, good and bad, 60 seconds
	$(RUN) tests/fuzz/surface.py --seconds $(FUZZ_SECONDS) $(ARGS)

noise-statistics: $(VENV)/.has-test native ## 1e8 samples of the noise against what they should be, a few minutes
	PYTHONPATH=. $(RUN) benchmarks/noise_statistics.py $(ARGS)

docs: $(VENV)/.has-docs native ## the documentation site, in build/docs/html, its examples run
	$(BIN)/sphinx-build -qW --keep-going -b doctest -d build/docs/trees docs build/docs/doctest
	$(BIN)/sphinx-build -qW --keep-going -b html -d build/docs/trees docs build/docs/html

bench: $(VENV)/.has-test native ## time the step against the published loop, 5 minutes
	$(BIN)/mmbal-fast bench $(ARGS)

matrix: wheels ## the wheels beside each version of torch, Python and frameworks that is claimed, hours
	$(PYTHON) benchmarks/matrix.py $(ARGS)

# Runs with the python3 that holds torch, on machines that reach no network.
gpu-check: ## on a machine with a GPU: build, test, compute-sanitizer, timings
	$(PYTHON) benchmarks/gpu_check.py

# Bytes that depend on the sources and the compilers alone: the only date is that of the version.
sdist wheel wheels: export SOURCE_DATE_EPOCH = \
    $(shell date -ud $$(sed -n 's/^date-released: "\(.*\)"/\1/p' CITATION.cff) +%s)
TAR := tar --format=posix --pax-option=delete=atime,delete=ctime --sort=name --owner=0 --group=0 \
    --numeric-owner --mode=go=rX,u+rw --mtime=@$$SOURCE_DATE_EPOCH

sdist: $(VENV)/.has-build ## the source distribution, in dist/
	rm -rf build/sdist dist/*.tar.gz && mkdir -p build/sdist dist
	$(RUN) setup.py --quiet egg_info --egg-base build/sdist sdist --formats=tar --dist-dir build/sdist
	cd build/sdist && tar -xf *.tar && name=$$(basename *.tar .tar) && \
	    $(TAR) -cf - $$name | gzip -9n > $(CURDIR)/dist/$$name.tar.gz

# The Python of .venv, and those of the machine that can make wheels. All share the objects that know
# no Python, and the first what `make build` compiled.
OWN = $(shell $(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PYTHONS = $(sort $(OWN) $(shell for minor in 10 11 12 13 14; do \
    if python3.$$minor -c 'import ensurepip, venv' 2>/dev/null; then echo 3.$$minor; fi; done))
PLATFORM = manylinux_2_28_$(shell uname -m)

wheel: PYTHONS = $(OWN)
wheel: wheels ## an sdist and a portable wheel for the Python of .venv, in dist/

# torch brings libgomp, and there must be one in a process.
wheels: sdist $(VENV)/.has-dist ## an sdist and wheels for all Pythons of the machine, in dist/
	rm -rf build/wheels build/lib.* dist/*.whl && mkdir -p build/wheels
	$(MAKE) -s $(VENV)/.has-dist $(patsubst %,build/pythons/%/.has-build,$(filter-out $(OWN),$(PYTHONS)))
	set -e; for version in $(PYTHONS); do \
	    if [ $$version = $(OWN) ]; then python=$(RUN); else python=build/pythons/$$version/bin/python; fi; \
	    PATH="$(abspath $(BIN)):$$PATH" MMBAL_PORTABLE=1 $$python setup.py --quiet \
	        egg_info --egg-base build/wheels bdist_wheel --dist-dir build/wheels; \
	done
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) \
	    --only-plat --exclude libgomp.so.1 --wheel-dir dist build/wheels/*.whl
	$(BIN)/twine check --strict dist/*
	ls -l dist

# nvcc writes its process id and the path of the source into names: so every compiler is the first
# process of a namespace, and both builds stand in one place.
reproducible: export CMAKE_CUDA_COMPILER_LAUNCHER = unshare;--map-root-user;--pid;--fork
reproducible: ## build all of dist/ twice from nothing, and compare the bytes
	set -e; for each in first second; do \
	    rm -rf build/native build/$$each; $(MAKE) wheels PYTHONS="$(PYTHONS)"; cp -R dist build/$$each; \
	done
	diff -r build/first build/second && sha256sum dist/*

clean: ## forget what was built, keep .venv
	rm -rf build dist *.egg-info mmbal_fast/*.so tests/emulation/*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# ---- The environment: a stamp for each extra of pyproject.toml ---------------------------------
# Python compiles what it imports; pip would compile all of it, which takes longer than the rest. So
# Python must be let keep it: torch alone takes seconds more in each of a hundred processes otherwise.
unexport PYTHONDONTWRITEBYTECODE

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "mmbal_fast needs Python 3.10 or later (got $$($(PYTHON) -V 2>&1));" \
	         "name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu:" \
	         "apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

build/pythons/%/.has-build: requirements/build.txt $(CONSTRAINTS)
	python$* -m venv build/pythons/$*
	build/pythons/$*/bin/python -m pip install -q --no-compile pybind11 setuptools -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.has-build: requirements/build.txt $(CONSTRAINTS) | $(RUN)
	$(RUN) -m pip install -q --no-compile -r requirements/build.txt -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.has-%: $(VENV)/.has-build pyproject.toml
	@echo "installing torch and what make needs for '$*' into $(VENV): once, a few minutes"
	$(INSTALL) '.[$*]'
	@touch $@
