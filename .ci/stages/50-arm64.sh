# Compiled for AArch64, and its C tests under emulation, when the tools can be had.
set -euo pipefail
if ! command -v aarch64-linux-gnu-gcc >/dev/null && [ "$(id -u)" = 0 ]; then
    (apt-get update -qq && apt-get install -y -qq gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user) >/dev/null 2>&1 || true
fi
if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64 >/dev/null; then
    make -s -j2 -C csrc CC=aarch64-linux-gnu-gcc WERROR=1 BUILD="$CI_WORK/core-arm64" \
        RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" test
else
    echo "no cross compiler or emulator here: skipped"
fi
