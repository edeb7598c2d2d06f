# Tests with several threads, with the extension built under the thread sanitizer.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
mkdir -p "$CI_WORK/tsan"
OURO_SANITIZE=thread python setup.py -q build_ext --build-lib "$CI_WORK/tsan" --build-temp "$CI_WORK/tsan-temp" >/dev/null 2>&1
cp -rn ouro/. "$CI_WORK/tsan/ouro/"
LD_PRELOAD="$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=exitcode=66 PYTHONPATH="$CI_WORK/tsan" \
    pytest -q -p no:cacheprovider tests/test_model.py tests/test_one_answer.py -k "two_threads or test_threads or alone_against_batch"
