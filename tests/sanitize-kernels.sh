#!/usr/bin/env bash
# Runs the CUDA kernels on the SIMT machine under the address and undefined behaviour sanitizers:
# what reads or writes beyond a buffer, a shared array or a type's alignment ends the run with its
# place in the kernel. Needs g++ (or clang++ as CXX) with its sanitizers; takes the conformance
# tests as cargo has built them.
#
#     tests/sanitize-kernels.sh [FILTER...]  tests whose names contain a FILTER; without, all kernels
#     tests/sanitize-kernels.sh --few        tables that reach every kernel with few cases, as CI does
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
filters=("${@:-kernel}")
if [[ ${1:-} == --few ]]; then
    # What is left out repeats the same kernels, to compare bits or with other shapes.
    export TOKENMILL_FEW_CASES=1
    filters=(simt:: kernel_agrees kernels_agree every_kernel)
fi
compiler=${CXX:-c++}
library() {
    local path
    path=$("$compiler" -print-file-name="$1")
    [[ $path == /* ]] || { echo "$compiler has no $1" >&2; exit 1; }
    echo "$path"
}
binary=$(cargo test --locked --release --test conformance --no-run --message-format json |
    sed -n 's/.*"executable":"\([^"]*conformance-[^"]*\)".*/\1/p' | tail -1)

# The test binary is not instrumented, so the sanitizer has to be there before it. Rust's threads
# and lazily made tables live until the process ends: they are no leaks.
export TOKENMILL_SIMT_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(library libasan.so) $(library libubsan.so)" "$binary" "${filters[@]}"
