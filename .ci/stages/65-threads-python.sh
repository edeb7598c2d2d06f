# Tests with several threads, with the extension built under the thread sanitizer.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
library="$(gcc -print-file-name=libtsan.so)"
[ -e "$library" ] || { echo "this gcc has no thread sanitizer: skipped"; exit 0; }
flock "$CI_WORK/pip.lock" pip install -q "setuptools>=77"  # stages run side by side
mkdir -p "$CI_WORK/tsan"
OURO_SANITIZE=thread python setup.py -q build_ext --build-lib "$CI_WORK/tsan" --build-temp "$CI_WORK/tsan-temp" \
    >"$CI_WORK/tsan.log" 2>&1 || { tail -n 30 "$CI_WORK/tsan.log"; exit 1; }
cp -rn ouro/. "$CI_WORK/tsan/ouro/"
LD_PRELOAD="$library" TSAN_OPTIONS=exitcode=66 PYTHONPATH="$CI_WORK/tsan" \
    pytest -q -p no:cacheprovider tests/test_model.py tests/test_one_answer.py tests/test_engine.py \
    -k "two_threads or test_threads or alone_against_batch or many_threads or pieces_come or coroutines or test_closing"
