# Forwards to CMake and to tools/. Two commands do everything on a fresh Debian machine: `make demo`, `make test`.
PRESET ?= release
PREFIX ?= /usr/local
JOBS ?= $(shell nproc)
# 0: without the dashboard
GUI ?= 1
BUILD := build/$(PRESET)

.PHONY: all build demo test cuda models install bench fuzz format lint clean

all: build

build:
	@tools/bootstrap.sh
	@[ "$(GUI)" = 0 ] || tools/dashboard.sh $(PRESET)
	@tools/build.sh $(PRESET) $(JOBS)

demo:
	@tools/bootstrap.sh
	@tools/build.sh $(PRESET) $(JOBS) kvlapse
	@tools/demo.sh $(BUILD)/kvlapse
	@[ "$(GUI)" = 0 ] || { tools/dashboard.sh $(PRESET) && tools/build.sh $(PRESET) $(JOBS) kvlapse && tools/pictures.sh $(BUILD)/kvlapse; }

test: build
	@ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)

# The same program with the GPU parts; needs nvcc 12.8 or newer.
cuda:
	@tools/bootstrap.sh
	@tools/build.sh cuda $(JOBS)

# Fetches SmolLM2-135M-Instruct (98 MB, Apache-2.0) into models/smollm2.
models:
	@tools/bootstrap.sh
	@tools/fetch_models.sh

install: build
	@cmake --install $(BUILD) --prefix $(PREFIX)

format:
	@git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i

lint: build
	@git ls-files 'core/*.cpp' 'trace/*.cpp' 'replay/*.cpp' 'cli/*.cpp' | xargs -P $(JOBS) -n 4 clang-tidy -p $(BUILD) --quiet

clean:
	@rm -rf build
