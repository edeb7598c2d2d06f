# The README's test command.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
pip install -q ".[test]"
python -m pytest -q tests
