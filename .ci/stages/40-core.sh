# The core without Python: gcc without a warning, address and undefined-behaviour sanitizers, thread sanitizer, clang.
# The C tests of OpenBLAS use the library that came with the package; the thread sanitizer would not know its locks.
set -euo pipefail
. .ci/tools.sh
. "$CI_WORK/venv/bin/activate"
blas=$(cd "$CI_WORK" && python -c "from ouro.loading import blas_library; print(blas_library() or '')")
core() { make -s -j2 -C csrc WERROR=1 "$@"; }
echo "gcc:" && OURO_TEST_BLAS="$blas" core CC=gcc BUILD="$CI_WORK/core-gcc" all bench test
echo "no wider instructions outside of the files written for them:"
python .ci/check_baseline.py "$CI_WORK/core-gcc"
for sanitize in address,undefined thread; do
    if [ ! -e "$(gcc -print-file-name="lib${sanitize:0:1}san.so")" ]; then
        echo "this gcc has no $sanitize sanitizer: skipped"
        continue
    fi
    echo "gcc, $sanitize sanitizer:"
    [ $sanitize = thread ] && blas=
    OURO_TEST_BLAS="$blas" core CC=gcc BUILD="$CI_WORK/core-$sanitize" SANITIZE=$sanitize test
done
if want clang clang; then
    echo "clang:" && core CC=clang BUILD="$CI_WORK/core-clang" all test
else
    echo "clang: skipped"
fi
