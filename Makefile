# Two commands do everything on a fresh Debian 12: `make demo` and `make test`.
# Each installs what it needs first (`make tools`): a virtual environment in .venv, qcompile in it, the cross
# compiler from PyPI, emulators, the firmware compiler and the browser that tests pages from Debian (with sudo unless you are root).

PYTHON ?= python3
VENV   ?= .venv
ORT120 ?= .venv-ort120
JOBS   ?= 2
PY     := $(VENV)/bin/python
SUDO   := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
APT    := $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.PHONY: demo test coverage lint tools debian clean

demo: tools
	$(VENV)/bin/qcompile models/digits-dscnn/model.onnx --calib models/digits-dscnn/calib.toml --target=arm -o demo/arm --force --strict
	$(VENV)/bin/qcompile models/digits-dscnn/model.onnx --calib models/digits-dscnn/calib.toml --target=x86 -o demo/x86 --force --strict
	$(VENV)/bin/qcompile models/digits-dscnn/model.onnx --calib models/digits-dscnn/calib.toml --target=mcu -o demo/mcu --force --strict
	$(VENV)/bin/qcompile models/digits-dscnn/model.onnx --calib models/digits-dscnn/calib.toml --target=hls --max-dsp=60 -o demo/hls --force --strict
	$(VENV)/bin/qcompile verify demo/arm --data models/digits-dscnn/eval.toml --samples 64
	$(VENV)/bin/qcompile eval demo/x86 --data models/digits-dscnn/eval.toml

test: tools $(ORT120)/.ready
	QCOMPILE_ORT120=$(abspath $(ORT120))/bin/python $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# slower by half: the cycle model of a design is Python through and through
coverage: tools $(ORT120)/.ready
	$(MAKE) test ARGS="--cov --cov-report=term:skip-covered $(ARGS)"

lint: tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

tools: debian $(VENV)/.ready

debian:
	@need=""; \
	command -v cc >/dev/null || need="$$need gcc libc6-dev"; \
	command -v qemu-aarch64 >/dev/null && command -v qemu-x86_64 >/dev/null && command -v qemu-hexagon >/dev/null || need="$$need qemu-user"; \
	command -v qemu-system-arm >/dev/null || need="$$need qemu-system-arm"; \
	command -v arm-none-eabi-gcc >/dev/null || need="$$need gcc-arm-none-eabi"; \
	command -v g++ >/dev/null || need="$$need g++"; \
	command -v verilator >/dev/null && command -v iverilog >/dev/null && command -v yosys >/dev/null || need="$$need verilator iverilog yosys"; \
	command -v cppcheck >/dev/null || need="$$need cppcheck"; \
	command -v chromium >/dev/null || need="$$need chromium"; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || need="$$need python3-venv"; \
	if [ -n "$$need" ]; then $(SUDO) apt-get update -qq && $(APT) $$need; fi

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet -e '.[dev,toolchain,tvm]'
	$(PY) -m pip install --quiet --no-deps 'hls4ml==1.3.0'  # for its Apache-2.0 ap_int.h alone
	touch $@

# integer.onnx has to be exact in the oldest onnxruntime it promises to run on
$(ORT120)/.ready:
	$(PYTHON) -m venv $(ORT120)
	$(ORT120)/bin/python -m pip install --quiet --upgrade pip
	$(ORT120)/bin/python -m pip install --quiet 'onnxruntime==1.20.1' 'numpy<2.3'
	touch $@

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
