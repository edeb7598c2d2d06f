# The README's first command in a new virtual environment, and the main job.
set -euo pipefail
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or later"; exit 1; }
python3 -m venv "$CI_WORK/venv" || { echo "no venv: on Debian it is the package python3-venv"; exit 1; }
. "$CI_WORK/venv/bin/activate"
pip install -q .
cd "$CI_WORK"
ouro generate "One day Ann took"
ouro info
ouro inspect "Ann is the boss of Bob."
printf 'Sort: 3 1 2\n\n' | ouro chat
