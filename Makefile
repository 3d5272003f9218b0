# make demo   install if needed, then run all four stages on synthetic faces: no download, no GPU, 12 minutes on two CPU cores
# make demo-classes, make demo-text   the same with labels or captions: 7 and 12 minutes after make demo
# make test   install if needed, then run the tests
# make faults   two minutes of fault injection with a fixed seed: damaged files, killed processes, full disks, bad input

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-classes demo-text test faults clean

demo: $(VENV)/installed
	$(RUN) train_vae.py configs/demo.yaml
	$(RUN) create_encodings.py configs/demo.yaml
	$(RUN) train_diffusion.py configs/demo.yaml
	$(RUN) infer.py configs/demo.yaml

demo-classes demo-text: demo
	$(RUN) train_diffusion.py configs/$(subst -,_,$@).yaml
	$(RUN) infer.py configs/$(subst -,_,$@).yaml

test: $(VENV)/installed-test
	$(RUN) -m pytest -n 2

faults: $(VENV)/installed-test
	$(RUN) benchmarks/faults.py 2 1

$(VENV)/installed: requirements.txt | $(VENV)
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements.txt requirements-test.txt | $(VENV)
	$(RUN) -m pip install -r requirements-test.txt
	touch $@ $(VENV)/installed

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "nanoLDM needs Python 3.11 or newer (got %s): make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
