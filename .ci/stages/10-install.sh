# The README's first command in a new virtual environment, and the main job.
set -euo pipefail
python3 -m venv "$CI_WORK/venv"
. "$CI_WORK/venv/bin/activate"
pip install -q .
cd "$CI_WORK"
ouro generate "One day Ann took"
ouro info
ouro inspect "Ann is the boss of Bob."
printf 'Sort: 3 1 2\n\n' | ouro chat
