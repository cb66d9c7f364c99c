# The commands of daily work; CONTRIBUTING.md explains them.
.PHONY: test lint bench docs

test:  ## the fast tests: six minutes on two cores
	python -m pytest -n 2

lint:  ## format, style and types
	ruff check .
	ruff format --check .
	mypy

bench:  ## one step beside other trainers, in turns; leave the machine alone meanwhile
	python -m benchmarks.training_step --sizes small --rounds 5

docs:  ## every command in docs/, as it stands there
	python -m pytest -n 2 -m docs
