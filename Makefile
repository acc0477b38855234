# Each target sets up what it needs: `make train`, `make test`. ARGS are passed on: make train ARGS="--loss ce".
PYTHON ?= python3
BIN := .venv/bin
UV := uv==0.13.9
# Containers often set it; every process would then compile PyTorch's Python files anew, for 15 seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train test test-slow test-latest test-floor test-gpu-stack rehearse check types lock bench aot

train: .venv/installed
	$(BIN)/python train/run.py $(ARGS)

# Two files at a time, as a file's tests share what they made; the longest first (tests/conftest.py).
# ARGS="-n 0" for one at a time, and for a debugger.
test: .venv/installed check types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

# What waits for minutes, as torchrun does between a failure and a restart: before a change lands.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow $(ARGS)

# The loss and its kernels with the newest PyTorch and Triton of PyPI, in a second environment (a few GB).
test-latest:
	@test -x .venv-latest/bin/python || $(PYTHON) -m venv .venv-latest
	@.venv-latest/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	@.venv-latest/bin/uv pip install --quiet --python .venv-latest/bin/python --upgrade torch torchvision triton --editable '.[dev]'
	.venv-latest/bin/python -m pytest tests/rcl_fast tests/kernels $(ARGS)

# The same with the lowest versions that setup.py allows (but Triton: the one that this PyTorch brings), in a third. A
# floor of numpy that this Python never had a wheel of gives way to the lowest that it has.
test-floor:
	@test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	@.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	@.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --resolution lowest-direct \
		--only-binary numpy --editable . 'torch==2.7.*' 'torchvision==0.22.*'
	@.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --editable '.[dev]'
	.venv-floor/bin/python -m pytest tests/rcl_fast tests/kernels $(ARGS)

# The same with the packages of a rented GPU machine (bench/gpu_stack.txt), uninstalled as there.
test-gpu-stack: .venv-gpu-stack/installed
	@bench/import_tree.sh build/import
	cd build/import && PYTHONPATH=$(CURDIR)/build/import ../../.venv-gpu-stack/bin/python -m pytest \
		../../tests/rcl_fast ../../tests/kernels $(ARGS)

# All that a GPU machine would be asked, on this one without its GPU: bench/README.md.
rehearse: .venv/installed .venv-gpu-stack/installed
	bench/rehearse.sh $(ARGS)

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The type checker sees the packages under the names that users import: rcl_fast, rcl_fast.kernels, rcl_fast.train.
types: .venv/installed
	@bench/import_tree.sh build/types
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p rcl_fast

bench: .venv/installed
	$(BIN)/python -m bench.loss.cpu $(ARGS)

# Every kernel and every entry of the block-size table, compiled without a GPU: after a change of a kernel or the table.
aot: .venv/installed
	$(BIN)/python -m bench.kernels.aot $(ARGS)
	$(BIN)/python -m bench.kernels.cost_model

# Exact versions from PyPI, no addresses; `make lock` after a change of setup.py or requirements.in.
lock: .venv/installed
	$(BIN)/uv pip compile requirements.in setup.py --extra train --extra dali --extra sweep --extra dev --universal \
		--python-version 3.10 --no-header --no-annotate --quiet --upgrade --output-file requirements.lock

.venv/installed: requirements.lock setup.py pyproject.toml $(wildcard kernels/__init__.py train/__init__.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed, $$($(PYTHON) --version) found: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing the locked requirements into .venv (a few GB the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

.venv-gpu-stack/installed: bench/gpu_stack.txt | .venv/installed
	@$(BIN)/uv venv --quiet --clear --seed --python 3.12 --no-python-downloads .venv-gpu-stack \
		|| { echo "no Python 3.12 here: $$($(PYTHON) --version) takes its place"; \
			$(BIN)/uv venv --quiet --clear --seed --python $(PYTHON) .venv-gpu-stack; }
	@$(BIN)/uv pip install --quiet --python .venv-gpu-stack/bin/python -r bench/gpu_stack.txt
	@touch $@
