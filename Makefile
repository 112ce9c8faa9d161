# make demo              the block on real images
# make test              some of every kind of test, in a few minutes
# make test-all          all of them, CPU and emulated CUDA
# make test-native       the C++ tests under sanitizers, and the mutation check, by CMake and ctest
# make test-cuda-build   the CUDA build for every architecture, its machine code, and the tests on another torch
# make bench             every benchmark; with PEERS=1 beside timm, mmcv, onnxruntime and OpenVINO
# make mutants           a tired developer's mistakes, one at a time: whether the tests notice them
# make wheel             a source archive and a wheel for other machines, into dist, tried on another torch
# make docs              the manual, into build/docs; make docs-links looks at every link, those to other sites too
# make fuzz              an hour's search for inputs that break the kernels; needs clang
# make gpu-check         everything that a GPU is needed for
# All but the last set up what they need in .venv or .venv-cuda, and install and build what is missing first.
#
# Variables: PYTHON (python3), VENV (.venv), TORCH (what pip installs as torch: a version, or a version and an index),
# BRIEF (1: some of every kind of test in test-all, test-native and test-cuda-build, as in .ci/run),
# WORKERS (processes that share the tests, one per core), ARGS (more arguments for the command), GCNET_EXT_CUDA (gpu: CUDA
# kernels where there is a GPU; 1: also elsewhere; 0: none).

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= auto
ARGS ?=

# Threads of several workers share the cores: those that wait must not keep the others from running.
PYTEST = OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal

export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml \
	gcnet_ext/_build.py gcnet_ext/_version.py
# The name says which torch is installed, so that another TORCH= installs and builds again.
TAG := $(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
INSTALLED := $(VENV)/installed-$(TAG)
GCNET_EXT_CUDA ?= $(if $(filter 1,$(FORCE_CUDA)),1,gpu)
BUILT := $(VENV)/built-$(TAG)-$(GCNET_EXT_CUDA)

PEERS ?=
# A second environment, with a CUDA build of torch, for all architectures; no GPU is needed to build and to run the CPU tests.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
CUDA_ARCHITECTURES ?= 7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX
CUDA_TAG := $(shell printf '%s' '$(CUDA_TORCH) $(CUDA_ARCHITECTURES)' | tr -c 'A-Za-z0-9.' '-')
CUDA_CHECKOUT := build/cuda-checkout
CUDA_BUILT = $(CUDA_CHECKOUT)/cuda-built-$(CUDA_TAG)

.PHONY: demo test test-all test-native test-cuda-build gpu-check lint format bench mutants fuzz wheel docs docs-links build clean

demo: $(BUILT)
	$(VENV)/bin/python examples/demo.py $(ARGS)

test: $(BUILT)
	$(PYTEST) --brief $(ARGS)
	@cat $(INSTALLED) $(BUILT)

test-all: $(BUILT)
	$(PYTEST) $(if $(BRIEF),--brief-with-slow) $(ARGS)

# With BRIEF=1 only tests/native is configured; tests/building/test_cmake.py builds and installs the library for C++ programs.
NATIVE := build/native$(if $(BRIEF),-brief)
test-native: $(BUILT)
	$(VENV)/bin/cmake -S $(if $(BRIEF),tests/native,.) -B $(NATIVE) -G Ninja -DGCNET_EXT_BRIEF=$(if $(BRIEF),ON,OFF)
	$(VENV)/bin/cmake --build $(NATIVE)
	$(VENV)/bin/ctest --test-dir $(NATIVE) --output-on-failure -j 2 $(ARGS)

# Runs the tests on the torch of CUDA_TORCH. The files ELSEWHERE are left out, because their result does not depend on torch. The
# folders TESTED run in full, because they use torch or other libraries directly; of the others some tests of every kind run, because
# they use the same kernels. Then the stable ABI is tested: the CPU library that was built here on the torch of .venv, and the wheels of
# either torch on the other. With BRIEF=1 only SOME_OF runs, some tests of every kind.
TESTED := models kernels building integration
SOME_OF := $(addprefix tests/,models bench/test_zoo.py kernels integration blocks ops docs)
ELSEWHERE := accuracy arm bench build capabilities docs endurance gpu_check cmake packaging paper_costs security types workflows large *_emulated
ON_THAT_TORCH = cd $(CUDA_CHECKOUT) && export TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" && \
	$(PYTEST:$(VENV)/%=$(abspath $(CUDA_VENV))/%) $(ELSEWHERE:%=--ignore-glob='tests/*/test_%.py') -k "not cuda-emulated"
test-cuda-build: $(CUDA_BUILT) $(BUILT)
	$(if $(BRIEF),,$(ON_THAT_TORCH) tests/bench/test_zoo.py $(TESTED:%=tests/%) $(ARGS))
	$(ON_THAT_TORCH) --brief $(if $(BRIEF),$(SOME_OF) $(ARGS),$(TESTED:%=--ignore=tests/%))
	cd $(CUDA_CHECKOUT) && $(PYTEST:$(VENV)/%=$(abspath $(VENV))/%) tests/building/test_abi.py \
		tests/ops/test_attention_pool.py tests/ops/test_channel_fuse.py -k "not cuda-emulated"
	GCNET_EXT_OTHER_PYTHON=$(abspath $(VENV))/bin/python $(PYTEST:$(VENV)/%=$(CUDA_VENV)/%) tests/building/test_packaging.py \
		$(if $(BRIEF),-k another_torch)

# On a machine with a GPU: builds for it, tests, times, and writes a report to the folder OUT. Uses the python on the PATH.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

# A long search for what breaks the kernels: libFuzzer (needs clang), then hypothesis with as many examples as the time allows,
# FUZZ_SECONDS for each half. All that it leaves behind is in build/fuzz: fuzz-*.log and crash-* of libFuzzer, and the examples
# of hypothesis, which tries a finding of the last run first.
FUZZ_SECONDS ?= 1800
fuzz: $(BUILT)
	CXX=clang++ $(VENV)/bin/cmake -S tests/native -B build/fuzz -G Ninja -DGCNET_EXT_LIBFUZZER=ON
	$(VENV)/bin/cmake --build build/fuzz --target cpu_fuzz
	mkdir -p build/fuzz/corpus
	cd build/fuzz && ./cpu_fuzz -max_total_time=$(FUZZ_SECONDS) -max_len=8192 -jobs=2 -workers=2 corpus
	HYPOTHESIS_STORAGE_DIRECTORY=build/fuzz/hypothesis PYTHONDONTWRITEBYTECODE=1 $(PYTEST) -p no:cacheprovider \
		tests/properties/test_properties.py tests/properties/test_fuzz.py tests/properties/test_fuzz_modules.py \
		--hypothesis-profile=explore --fuzz-seconds=$(FUZZ_SECONDS) $(ARGS)

# The pages are read from the whole checkout, because they link to files all over it.
SPHINX = PYTHONPATH=$(CURDIR) $(VENV)/bin/python -m sphinx -q --fail-on-warning --keep-going -c docs
docs: $(BUILT)
	$(SPHINX) -b html . build/docs $(ARGS)
	@echo "The manual begins at build/docs/docs/index.html."

docs-links: $(BUILT)
	$(SPHINX) -b linkcheck . build/docs-links $(ARGS)

# Each of tests/mutants in a copy in build/mutants; fails where the Python tests notice less than 95 % of them.
mutants: $(BUILT)
	$(VENV)/bin/python tests/mutants/make_mutants.py $(ARGS)

# Everything that can be measured here, into build/bench; ARGS=--quick takes two minutes. With PEERS=1 beside other libraries, and
# in whole models, which need torchvision and so the torch of CUDA_TORCH: the CPU library of .venv runs on that, too.
bench: $(BUILT) $(if $(PEERS),$(CUDA_VENV)/installed-$(CUDA_TAG))
	PYTHONPATH=$(CURDIR) $(if $(PEERS),$(CUDA_VENV),$(VENV))/bin/python bench/run.py $(ARGS)
	$(if $(PEERS),PYTHONPATH=$(CURDIR) $(CUDA_VENV)/bin/python bench/whole_models.py --json build/bench/whole_models.json)
	$(if $(PEERS),PYTHONPATH=$(CURDIR) $(CUDA_VENV)/bin/python bench/whole_engines.py --json build/bench/whole_engines.json)

# The wheel is built from the source archive. GCNET_EXT_CUDA=1 makes one with CUDA kernels, by the torch of CUDA_TORCH. It brings none
# of the libraries that torch has loaded: of a second OpenMP, the threads would not be shared. The platform that its name tells is
# what auditwheel finds. Then a new environment has the wheel and another torch.
OF_TORCH := libtorch* libc10* libcudart* libcuda* libgomp*
WITH_CUDA := $(filter 1,$(GCNET_EXT_CUDA))
WHEEL_PYTHON = $(abspath $(if $(WITH_CUDA),$(CUDA_VENV),$(VENV)))/bin/python
ANOTHER_TORCH ?= $(if $(WITH_CUDA),$(TORCH),$(CUDA_TORCH))
wheel: $(if $(WITH_CUDA),$(CUDA_VENV)/installed-$(CUDA_TAG),$(INSTALLED))
	rm -rf dist build/wheel
	GCNET_EXT_CUDA=$(or $(WITH_CUDA),0) TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" $(WHEEL_PYTHON) -m build --no-isolation --outdir build/wheel .
	PATH=$(dir $(WHEEL_PYTHON)):$$PATH $(WHEEL_PYTHON) -m auditwheel repair $(OF_TORCH:%=--exclude '%') --wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet $(ANOTHER_TORCH) dist/*.whl
	cd build/wheel && venv/bin/python $(CURDIR)/tests/building/try_wheel.py
	@ls -l dist

build: $(BUILT)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(filter csrc/%,$(SOURCES)) $(wildcard examples/*/*.cpp tests/native/cpu/*.cpp)

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(filter csrc/%,$(SOURCES)) $(wildcard examples/*/*.cpp tests/native/cpu/*.cpp)

# Each of the two leaves behind how long it took.
$(INSTALLED): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("$(PYTHON) is Python %d.%d, and 3.10 or newer is needed:"\
		" name one with PYTHON=" % sys.version_info[:2])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/installed-* $(VENV)/built-*
	SECONDS=0 && $(VENV)/bin/pip install $(TORCH) && $(VENV)/bin/pip install --quiet -r requirements-dev.txt && \
		echo "The packages took $$SECONDS s to install." > $@

# $(call compile,PIP): installs the folder. pip hides what a build says unless it is asked for all of it; of that the sources are
# shown as they are done, and the end where it fails.
compile = mkdir -p build && set -o pipefail && { $(1) install -v --no-build-isolation --no-deps -e . 2>&1 | \
	tee build/compile.log | sed -nu "s|^ *\(\[[0-9]*/[0-9]*\]\) .* -c .*/\(csrc/[^ ']*\)'* -o .*|  \1 \2|p" || \
	{ tail -n 40 build/compile.log; exit 1; }; }

$(BUILT): $(INSTALLED) $(SOURCES)
	@rm -f $(VENV)/built-*
	@GCNET_EXT_CUDA=$(GCNET_EXT_CUDA) $(VENV)/bin/python gcnet_ext/_build.py cuda
	@echo "gcnet_ext: compiling; all that the compiler says is in build/compile.log"
	@SECONDS=0 && export GCNET_EXT_CUDA=$(GCNET_EXT_CUDA) && $(call compile,$(VENV)/bin/pip) && \
		echo "The kernels took $$SECONDS s to compile." > $@

$(CUDA_VENV)/installed-$(CUDA_TAG): requirements-dev.txt requirements-peers.txt
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/pip install --quiet $(CUDA_TORCH)
	$(CUDA_VENV)/bin/pip install --quiet -r requirements-dev.txt -r requirements-peers.txt
	touch $@

# In a checkout of its own, so that neither build takes the other's for its own.
$(CUDA_BUILT): $(CUDA_VENV)/installed-$(CUDA_TAG) $(SOURCES) $(wildcard gcnet_ext/*.py gcnet_ext/*/*.py bench/*.py examples/*.py) $(shell find tests -type f -not -path '*/__pycache__/*')
	mkdir -p $(CUDA_CHECKOUT)
	rm -rf $(CUDA_CHECKOUT)/cuda-built-* $(addprefix $(CUDA_CHECKOUT)/,csrc gcnet_ext tests bench examples docs)
	tar -c --exclude='*.so' --exclude=__pycache__ csrc gcnet_ext tests bench examples docs setup.py pyproject.toml MANIFEST.in *.md CITATION.cff LICENSE \
		Makefile CMakeLists.txt requirements-*.txt | tar -x -C $(CUDA_CHECKOUT)
	@cd $(CUDA_CHECKOUT) && export GCNET_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHITECTURES)" && \
		$(abspath $(CUDA_VENV))/bin/python gcnet_ext/_build.py cuda && $(call compile,$(abspath $(CUDA_VENV))/bin/pip)
	touch $@

clean:
	rm -rf build dist *.egg-info gcnet_ext/*.so $(VENV)/built-*
