# The core without Python: gcc without a warning, address and undefined-behaviour sanitizers, thread sanitizer, clang.
set -euo pipefail
export CC=gcc WERROR=-Werror
make -s -j2 -C csrc OUT="$CI_WORK/core" all check
make -s -j2 -C csrc OUT="$CI_WORK/core-address" SANITIZE=address,undefined check
make -s -j2 -C csrc OUT="$CI_WORK/core-thread" SANITIZE=thread check
if ! command -v clang >/dev/null && [ "$(id -u)" = 0 ]; then
    (apt-get update -qq && apt-get install -y -qq clang) >/dev/null 2>&1 || true
fi
if command -v clang >/dev/null; then
    make -s -j2 -C csrc CC=clang OUT="$CI_WORK/core-clang" all check
else
    echo "clang is not to be had here: skipped"
fi
