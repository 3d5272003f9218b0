# make demo   install if needed, then all four stages on drawn faces: no download, no GPU, about 13 minutes on two cores
# make demo-classes, make demo-text   after it: a U-Net by attributes, or from words (8 and 12 minutes), and their grids
# make test   install if needed, then the tests

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo demo-classes demo-text test clean

demo: $(VENV)/installed
	$(RUN) train_vae.py configs/demo.yaml
	$(RUN) create_encodings.py configs/demo.yaml
	$(RUN) train_diffusion.py configs/demo.yaml
	$(RUN) infer.py configs/demo.yaml

demo-classes demo-text: demo
	$(RUN) train_diffusion.py configs/$(subst -,_,$@).yaml
	$(RUN) infer.py configs/$(subst -,_,$@).yaml

test: $(VENV)/installed-test
	$(RUN) -m pytest

$(VENV)/installed: requirements.txt | $(VENV)
	$(RUN) -m pip install -r requirements.txt
	touch $@

$(VENV)/installed-test: requirements.txt requirements-test.txt | $(VENV)
	$(RUN) -m pip install -r requirements-test.txt
	touch $@ $(VENV)/installed

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s; name one with: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
