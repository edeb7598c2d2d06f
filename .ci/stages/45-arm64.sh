# Compiled for AArch64, and its C tests under emulation; on x86-64 also the installed package on an emulated processor without AVX.
set -euo pipefail
. .ci/tools.sh
packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
if want aarch64-linux-gnu-gcc $packages && want qemu-aarch64 $packages; then
    make -s -j2 -C csrc CC=aarch64-linux-gnu-gcc WERROR=1 BUILD="$CI_WORK/core-arm64" \
        RUN="qemu-aarch64 -L /usr/aarch64-linux-gnu" test
else
    echo "AArch64: skipped"
fi
if [ "$(uname -m)" = x86_64 ] && command -v qemu-x86_64 >/dev/null; then
    cd "$CI_WORK"
    here=$(venv/bin/ouro generate "One day Ann took" -n 16)
    for cpu in Nehalem Haswell; do
        there=$(qemu-x86_64 -cpu $cpu venv/bin/python -m ouro generate "One day Ann took" -n 16 2>/dev/null)
        [ "$here" = "$there" ] || { echo "$cpu says '$there', this machine '$here'"; exit 1; }
        qemu-x86_64 -cpu $cpu venv/bin/python -m ouro info 2>/dev/null | grep '^kernels' | sed "s/^/emulated $cpu, the same text: /"
    done
fi
