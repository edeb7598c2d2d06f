# Tests that drive the core from Python, with the extension built under the address and undefined-behaviour sanitizers.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
for library in $libraries; do
    [ -e "$library" ] || { echo "this gcc has no address sanitizer: skipped"; exit 0; }
done
flock "$CI_WORK/pip.lock" pip install -q "setuptools>=77"  # stages run side by side
mkdir -p "$CI_WORK/asan"
OURO_SANITIZE=address,undefined python setup.py -q build_ext --build-lib "$CI_WORK/asan" --build-temp "$CI_WORK/asan-temp" \
    >"$CI_WORK/asan.log" 2>&1 || { tail -n 30 "$CI_WORK/asan.log"; exit 1; }
cp -rn ouro/. "$CI_WORK/asan/ouro/"
LD_PRELOAD="$libraries" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$CI_WORK/asan" \
    pytest -q -m "core and not slow" tests -p no:cacheprovider
