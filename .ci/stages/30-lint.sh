# Style and types.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
ruff check ouro tests setup.py benchmarks
mypy --strict ouro
