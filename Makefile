# Every target works in a fresh clone: the virtual environment is made on first use.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
# Stamps: what users need is installed; what tests, checks and pages need besides.
READY := $(VENV)/.ready
DEVELOPED := $(VENV)/.developed
TINY := runs/tiny
PROMPT := The list method
# One process and two write the same text in float32 on one kind of device.
ALIKE := --dtype fp32 --device cpu
# Of the two finetuning demos.
DIALOGUES := 300
EPOCHS := 12
LORA_EPOCHS := 16
MODEL := epoch$(shell expr $(EPOCHS) - 1)
ADAPTER := epoch$(shell expr $(LORA_EPOCHS) - 1)

# Programs that tests start, and pytest's own processes, would compile every module each time.
unexport PYTHONDONTWRITEBYTECODE

# Their order is part of what they say.
.NOTPARALLEL:
.PHONY: install demo coming finetune-demo peft-demo demo-web test test-fast lint docs checked pytest test-browser chromium soak bench clean

install: $(READY)

# There while pip works: what it has begun to install counts as installed for it, though files may be missing.
INSTALLING := $(VENV)/.installing

# pip compiles modules one after another, for half of its time: users' are compiled on all cores, the developers' as they
# are imported.
PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

# torch goes first and pinned: another package's range must not choose it.
$(READY): setup.py pyproject.toml constraints.txt $(wildcard accessory/kernels/cpu/*.cpp accessory/kernels/cpu/*.h)
	@if test -e $(INSTALLING); then echo "An installation was cut short: beginning anew in $(VENV)."; rm -rf $(VENV); fi
	@echo "Installing PyTorch and what accessory needs into $(VENV): 80 packages, 1.4 GB (more where PyTorch brings CUDA), minutes."
	$(PYTHON) -m venv $(VENV)
	touch $(INSTALLING)
	$(PIP) torch
	$(PIP) --editable .
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # some hold examples of what is no Python
	rm $(INSTALLING)
	touch $(READY)

$(DEVELOPED): $(READY)
	@echo "Installing what tests, checks and pages need besides: 100 packages, 1.0 GB, minutes."
	rm $(READY)
	touch $(INSTALLING)
	$(PIP) --editable ".[dev]"
	rm $(INSTALLING)
	touch $(READY) $(DEVELOPED)

# The whole way once: make a model, convert it, ask it with one process and with two.
demo: coming $(TINY)/converted
	$(BIN)/accessory inspect $(TINY)/converted
	$(BIN)/accessory generate $(TINY)/converted $(ALIKE) --prompt "$(PROMPT)" --max-gen-len 64 | tee $(TINY)-one.txt
	$(BIN)/accessory generate $(TINY)/converted $(ALIKE) --nproc 2 --prompt "$(PROMPT)" --max-gen-len 64 \
		| tee $(TINY)-two.txt
	cmp $(TINY)-one.txt $(TINY)-two.txt
	@echo "1 and 2 processes wrote the same text."
	@echo "Next: source $(VENV)/bin/activate, then go on with docs/quickstart.md."

# What is still to come, before it begins.
coming:
	@echo "make demo, on 2 cores; stopped, it goes on with the same command:"
	@test -e $(READY) || echo "- install PyTorch and what accessory needs into $(VENV): 80 packages, 1.4 GB (more where PyTorch brings CUDA), minutes"
	@test -e $(TINY)/consolidated.00.pth || echo "- train a tiny Mixtral on Python's own documentation: 3 minutes, 1 GB of memory"
	@echo "- convert it, and ask it with 1 and with 2 processes: half a minute"

$(TINY)/converted: $(TINY)/consolidated.00.pth
	cp accessory/tools/split.py $(TINY)/
	cd $(TINY) && $(BIN)/python split.py

$(TINY)/consolidated.00.pth: | $(READY)
	$(BIN)/accessory tiny --out $(TINY)

# The tiny model learns dialogues on two processes; it is asked before and after.
finetune-demo: $(TINY)/converted
	rm -rf runs/dialogues runs/finetuned
	$(BIN)/python -m accessory.tools.docstring_dialogues runs/dialogues --limit $(DIALOGUES)
	@echo "--- before (the last two questions are not in the training data)"
	$(BIN)/accessory generate $(TINY)/converted $(ALIKE) --dialog --max-gen-len 32 --prompt-file runs/dialogues/questions.txt
	@echo "--- training, two minutes on 2 cores"
	$(BIN)/accessory finetune --nproc 2 \
		--pretrained_path $(TINY)/converted --data_config runs/dialogues/data.yaml --output_dir runs/finetuned \
		--epochs $(EPOCHS) --batch_size 2 --packing --lr 2e-3 --min_lr 1e-4 --warmup_epochs 0.5 --max_words 256 \
		--precision fp32 --device cpu --save_interval $(EPOCHS) \
		--eval_data_config runs/dialogues/held_out.yaml --eval_first
	@echo "--- held-out loss, before and after"
	grep -ho "step .*held-out loss.*" runs/finetuned/output.log | sed -n '1p;$$p'
	$(BIN)/accessory plot runs/finetuned
	@echo "--- after"
	$(BIN)/accessory generate runs/finetuned/$(MODEL) $(ALIKE) --max-gen-len 32 --prompt-file runs/dialogues/questions.txt

# The same with an adapter on one process; its folder holds nothing else. It is asked over its base, and merged.
peft-demo: $(TINY)/converted
	rm -rf runs/dialogues runs/adapter runs/merged
	$(BIN)/python -m accessory.tools.docstring_dialogues runs/dialogues --limit $(DIALOGUES)
	@echo "--- before (the last two questions are not in the training data)"
	$(BIN)/accessory generate $(TINY)/converted $(ALIKE) --dialog --max-gen-len 32 --prompt-file runs/dialogues/questions.txt
	@echo "--- training, three minutes on 2 cores"
	$(BIN)/accessory finetune --lora_rank 64 --lora_alpha 256 --bias_tuning --norm_tuning \
		--pretrained_path $(TINY)/converted --data_config runs/dialogues/data.yaml --output_dir runs/adapter \
		--epochs $(LORA_EPOCHS) --batch_size 4 --lr 1e-3 --min_lr 1e-4 --warmup_epochs 0.5 --max_words 256 \
		--precision fp32 --device cpu --save_interval $(LORA_EPOCHS) --only_save_trainable
	@echo "--- after"
	$(BIN)/accessory generate $(TINY)/converted runs/adapter/$(ADAPTER) $(ALIKE) --max-gen-len 32 \
		--prompt-file runs/dialogues/questions.txt
	$(BIN)/accessory merge $(TINY)/converted runs/adapter/$(ADAPTER) runs/merged

# A page to talk to the tiny model; to the finetuned one, where `make finetune-demo` has made it.
demo-web: $(TINY)/converted
	$(BIN)/python demos/multi_turn.py --n_gpus 2 --device cpu \
		--pretrained_path $(or $(wildcard runs/finetuned/$(MODEL)),$(TINY)/converted)

# Everything that CI runs.
test: checked pytest

# While a room is changed: a quarter of the time, and none of it bound by time.
test-fast: lint
	$(BIN)/pytest -n 3 --dist worksteal -m "not soak and not alone and not slow"

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
PAGES = $(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

lint: $(DEVELOPED)
	$(LINT)

docs: $(DEVELOPED)
	$(PAGES)

# Both at once, since each keeps one core busy.
checked: $(DEVELOPED)
	($(LINT)) & lint=$$!; $(PAGES) && wait $$lint

# Half of what tests do is waiting for processes, so three run at a time on 2 cores; then what is bound by time, alone.
pytest: $(DEVELOPED) chromium
	$(BIN)/pytest -n 3 --dist worksteal -m "not soak and not alone"
	$(BIN)/pytest -m alone

# The pages in a real browser, which `make pytest` tests as well; pictures of them go to build/screenshots.
test-browser: $(DEVELOPED) chromium
	$(BIN)/pytest tests/test_web_browser.py

chromium:
	@command -v chromium || command -v chromium-browser || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
	echo "no chromium, and only root may install Debian's: the tests in a browser are skipped"

# What takes longer: a run that is killed 30 times, whose last result stands in docs/reliability.md; 500 clients that
# leave a server midway, and long fuzzing of it; layouts of more ranks.
soak: $(DEVELOPED)
	$(BIN)/pytest -m soak

bench: $(DEVELOPED)
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/serve.py --requests 32
	$(BIN)/python benchmarks/serve.py --models tiny --clients 64 --requests 2000

clean:
	rm -rf $(VENV) build runs *.egg-info accessory/kernels/cpu/*.so
