# The notebooks run on the packaged model, from a folder that is not the source's; an error in any cell fails. What is stored
# in the repository is not touched.
set -euo pipefail
python3 -m venv "$CI_WORK/notebooks-venv"
. "$CI_WORK/notebooks-venv/bin/activate"
pip install -q ".[notebook,probe]"
notebooks=$PWD/notebooks
mkdir -p "$CI_WORK/notebooks"
cd "$CI_WORK/notebooks"
export HF_HUB_OFFLINE=1
jupyter nbconvert --to notebook --execute --log-level WARN --ExecutePreprocessor.timeout=120 --output-dir . "$notebooks"/*.ipynb
ls -l
