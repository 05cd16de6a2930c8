# The commands that .ci/run and CONTRIBUTING.md name, one line each.
.PHONY: install style quality test test-slow docs benchmarks distributions

install:
	pip install -e ".[dev]"

style:
	ruff check --fix . && ruff format .

quality:
	ruff check . && ruff format --check . && typos && mypy && lint-imports --no-cache

test:
	pytest

test-slow:
	pytest -m "slow and not gpu"

docs:
	python .ci/write_references.py && zensical build --clean --strict --config-file mkdocs.yml

benchmarks:
	python -m benchmarks.codebase.code_size --label after --run-tests && python -m benchmarks.tables.render_tables

distributions:
	.ci/build
