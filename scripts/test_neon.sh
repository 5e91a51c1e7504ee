#!/usr/bin/env bash
# Builds the kernels alone (tests/kernels) for aarch64 and runs their tests on an emulated CPU, on
# which they compare the NEON kernels with the scalar ones bit by bit. It measures no speed.
#
#   scripts/test_neon.sh [ARGUMENTS of cargo test]
#
# Installs nothing: says which Debian packages and which Rust target are missing. On an ARM machine
# `cargo test --release --manifest-path tests/kernels/Cargo.toml` does the same without emulation.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

target=aarch64-unknown-linux-gnu
missing=()
has aarch64-linux-gnu-gcc || missing+=(gcc-aarch64-linux-gnu)
[ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ] || missing+=(libc6-dev-arm64-cross)
has qemu-aarch64-static || missing+=(qemu-user-static)
[ ${#missing[@]} -eq 0 ] || fail "Debian packages are missing: apt-get install ${missing[*]}"
[ -d "$(rustc --print sysroot)/lib/rustlib/$target/lib" ] ||
    fail "the standard library for $target is missing: rustup target add $target"

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu max -L /usr/aarch64-linux-gnu"
# .cargo/config.toml builds for the CPU at hand, which is another one.
export RUSTFLAGS=
export INGOT_TEST_ISA=neon
exec cargo test --release --manifest-path tests/kernels/Cargo.toml --target "$target" "$@"
