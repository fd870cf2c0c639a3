# The entry point. Each target sets up everything that it needs: Debian packages, tools, cluster, image.
# Builds and downloads are in ~/.cache/belay (BELAY_CACHE) and target/.
.DEFAULT_GOAL := help
.PHONY: help hello demo demo-image test bench escape chaos fuzz models frameworks lint generate image install cluster-up cluster-down clean

CACHE := $(or $(BELAY_CACHE),$(HOME)/.cache/belay)

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

hello: ## An agent on a rope on this machine, in minutes: no cluster, no image, no key
	@e2e/hello

demo: install ## An agent on a rope, from nothing: cluster, image, install, run, verify
	@e2e/cluster/load "$$(e2e/demo/image)" >/dev/null
	@set -a; . $(CACHE)/cluster/s3.env; AWS_ACCESS_KEY_ID=$$S3_ACCESS_KEY AWS_SECRET_ACCESS_KEY=$$S3_SECRET_KEY AWS_REGION=$$S3_REGION BELAY=$(CACHE)/bin-host/belay e2e/demo/run

test: ## The tests of a change; ends with `N passed, N failed` (ONLY="STAGE…" for some)
	@e2e/test $(ONLY)

bench: $(if $(filter decision% evidence% model%,$(ONLY)),,install) ## Measures: a table, and target/bench.jsonl (ONLY=prefix for some; decision, evidence and model need no cluster)
	@e2e/bench/run $(ONLY)

escape: install ## An agent's attempts to get out of its pod, and the control in which they succeed
	@e2e/cluster/load "$$(e2e/demo/image)" >/dev/null
	@e2e/test escape

chaos: install ## The API server is killed, stopped, slow or without history, 50 times while 200 tasks run; ends in a table (half an hour and more)
	@e2e/cluster/load "$$(e2e/demo/image)" >/dev/null
	@e2e/test chaos; status=$$?; grep -A 200 '^chaos: seed .* s$$' $(CACHE)/logs/test-chaos.log | grep -E '^(chaos:|  )'; exit $$status

fuzz: ## Every mutant of real logs and 5,000 structured ones for both verifiers, 10^7 generated calls against the reference, 10^6 that must not delay a ticker, 10^5 orders of events, and five parsers by libFuzzer
	@BELAY_MUTANTS=all BELAY_SWEEP=all BELAY_STRUCTURED=$(or $(BELAY_STRUCTURED),5000) cargo test --release --locked --no-default-features --test evidence -- --nocapture
	@BELAY_CALLS=10000000 cargo test --release --locked --no-default-features --lib reference
	@BELAY_CALLS=1000000 cargo test --release --locked --no-default-features --features harness --lib generated_call -- --nocapture
	@BELAY_ORDERS=100000 cargo test --release --locked --no-default-features --features operator --lib operator::tests::orders
	@e2e/fuzz/run

models: ## 10,000 model calls under random faults, official SDKs, llama.cpp and LiteLLM: what Belay counts, compared with what was produced
	@e2e/model/run $(ONLY)

frameworks: ## All agent frameworks of other projects, and their matrix in docs/frameworks.md (4 GB of packages)
	@e2e/frameworks/run $(ONLY)

lint: ## The checks that need no cluster
	@e2e/test lint

generate: ## CRDs, chart of CRDs, kustomize folders and docs/reference from their sources
	@e2e/generate

demo-image:
	@e2e/demo/image >/dev/null

image: ## The container image, from the Dockerfile, without a registry
	@e2e/image/build

install: ## Charts, Secrets and the dev policy pack onto the test cluster
	@$(MAKE) --no-print-directory -j3 cluster-up image demo-image
	@e2e/install

cluster-up: ## The test cluster and its pretend internet
	@e2e/cluster/up
	@e2e/world/up

cluster-down: ## Stops the test cluster and its pretend internet
	@e2e/world/down
	@e2e/cluster/down

clean: cluster-down ## Stops both, and removes what was built, here and in the cache
	@rm -rf target $(CACHE)
