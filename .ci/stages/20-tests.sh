# The README's test command (not `python -m pytest`, which would import the source folder instead of what is installed).
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
pip install -q ".[test]"
pytest tests
