# The core without Python: gcc without a warning, address and undefined-behaviour sanitizers, thread sanitizer, clang.
# The C tests of OpenBLAS use the library that came with the package; the thread sanitizer would not know its locks.
set -euo pipefail
. "$CI_WORK/venv/bin/activate"
blas=$(cd "$CI_WORK" && python -c "from ouro.loading import blas_library; print(blas_library() or '')")
core() { make -s -j2 -C csrc WERROR=1 "$@"; }
OURO_TEST_BLAS="$blas" core CC=gcc BUILD="$CI_WORK/core-gcc" all bench test
OURO_TEST_BLAS="$blas" core CC=gcc BUILD="$CI_WORK/core-address" SANITIZE=address,undefined test
core CC=gcc BUILD="$CI_WORK/core-thread" SANITIZE=thread test
if ! command -v clang >/dev/null && [ "$(id -u)" = 0 ]; then
    (apt-get update -qq && apt-get install -y -qq clang) >/dev/null 2>&1 || true
fi
if command -v clang >/dev/null; then
    core CC=clang BUILD="$CI_WORK/core-clang" all test
else
    echo "clang is not to be had here: skipped"
fi
