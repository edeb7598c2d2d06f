# Tests that drive the core from Python, with the extension built under the address and undefined-behaviour sanitizers.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
pip install -q "setuptools>=77"
mkdir -p "$CI_WORK/asan"
OURO_SANITIZE=address,undefined python setup.py -q build_ext --build-lib "$CI_WORK/asan" --build-temp "$CI_WORK/asan-temp" >/dev/null 2>&1
cp -rn ouro/. "$CI_WORK/asan/ouro/"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH="$CI_WORK/asan" \
    pytest -q -m core tests -p no:cacheprovider
