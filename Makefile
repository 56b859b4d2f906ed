# format and lint while working, test before a commit, check before a push.
.PHONY: format lint test check

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test:
	.venv/bin/pytest -n auto --dist loadfile

check:
	.ci/run
