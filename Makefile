# demo and test need only Python 3.10+, a C++17 compiler and pip: they make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1

SOURCES = setup.py pyproject.toml constraints.txt requirements-data.txt $(shell find csrc -type f)

.PHONY: demo test dev lint bench sanitize gate oracle gpu build clean

demo: $(VENV)/installed            ## train a CLIP on real data, in minutes
	$(BIN)/fastcontrast demo $(ARGS)

# Threads of one process that wait for work by spinning would slow down the others'.
test: $(VENV)/installed $(VENV)/integrations build/triton-3.6 build/transformers-4.57   ## all tests
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

dev: $(VENV)/installed             ## tools for working on the code
	$(BIN)/pip install -q -e ".[demo,generate,train,test,dev]"
	$(BIN)/pre-commit install

lint: $(VENV)/lint                 ## ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(VENV)/integrations        ## floors and rivals, table, plot and JSON
	$(BIN)/fastcontrast bench $(ARGS)

sanitize: $(VENV)/installed        ## the C++ core under ASan and UBSan
	rm -rf build/sanitize
	FASTCONTRAST_SANITIZE=address,undefined $(BIN)/python setup.py -q build_ext --build-lib build/sanitize \
		--build-temp build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/sanitize.py build/sanitize

gate: $(VENV)/installed build/triton-3.6   ## compile every Triton kernel, without a GPU: registers, spills, shared memory
	$(BIN)/python tests/compile_gate.py
	if [ -d build/triton-3.6 ]; then PYTHONPATH=build/triton-3.6 $(BIN)/python tests/compile_gate.py --without-cuda; fi

oracle: $(VENV)/installed build/transformers-4.55   ## contrastive search as transformers 4.55.4 has it, against the record
	PYTHONPATH=build/transformers-4.55 $(BIN)/python tests/oracle.py --check
	$(BIN)/python -m pytest tests/test_contrastive_search.py -k last_version

gpu:                               ## on a CUDA machine with torch and Triton: build, GPU tests, memory checker, benchmarks
	$(PYTHON) tests/gpu.py

build: $(VENV)/installed           ## wheel and source archive in dist/
	$(BIN)/pip install -q build
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info fastcontrast/_C*.so demo-output generate-output train-output bench-output gpu-output

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch
	$(BIN)/pip install -q setuptools pybind11
	$(BIN)/pip install -q -e ".[demo,generate,train,test]"
	$(BIN)/pip install -q --no-deps -r requirements-data.txt
	touch $@

# The oldest Triton that is supported, beside the newest; where it has no wheel its compile gate is skipped, and says so.
build/triton-3.6: | $(VENV)/installed
	-PIP_CONSTRAINT= $(BIN)/pip install -q --no-deps --target $@ triton==3.6.0

# The oldest transformers that is supported, beside the newest, and the last that had contrastive search of its own.
TRANSFORMERS = -PIP_CONSTRAINT= $(BIN)/pip install -q --no-deps --target $@
build/transformers-4.57: | $(VENV)/installed
	$(TRANSFORMERS) transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2

build/transformers-4.55: | $(VENV)/installed
	$(TRANSFORMERS) transformers==4.55.4 tokenizers==0.21.4 huggingface-hub==0.36.2

# The libraries that the integrations drop into, which are also the rivals of the benchmarks. By name: fastcontrast itself
# is not built again for them.
EXTRAS = from importlib.metadata import requires; \
	print(*(x.split(";")[0] for x in requires("fastcontrast") if "integrations" in x or "bench" in x))
$(VENV)/integrations: $(VENV)/installed
	$(BIN)/pip install -q $$($(BIN)/python -c '$(EXTRAS)')
	touch $@

$(VENV)/lint: $(VENV)/installed
	$(BIN)/pip install -q ruff clang-format
	touch $@
