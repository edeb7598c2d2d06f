# The wheel installs without a compiler; the source archive builds with one. Both do the main job.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
pip install -q build
python -m build --outdir "$CI_WORK/dist" . >"$CI_WORK/build.log" 2>&1 || { tail -n 30 "$CI_WORK/build.log"; exit 1; }
ls -l "$CI_WORK/dist"
for kind in whl tar.gz; do
    python3 -m venv "$CI_WORK/clean-$kind"
    if [ $kind = whl ]; then compiler=/bin/false; else compiler=gcc; fi
    CC=$compiler "$CI_WORK/clean-$kind/bin/pip" install -q "$CI_WORK"/dist/*.$kind
    (cd "$CI_WORK" && "clean-$kind/bin/ouro" generate "One day Ann took" -n 16)
done
