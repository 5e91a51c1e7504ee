#!/usr/bin/env bash
# Measures Ingot beside llama.cpp, ik_llama.cpp and mistral.rs on this machine, and prints the tables
# of docs/performance.md: kernels (bench_kernels.py), then servers (bench_peers.py). Everything is kept as JSON in
# .cache/bench, and so are 5 GB of models. The machine should do nothing else for some two hours.
#
#   scripts/bench.sh [REPETITIONS, 5 unless given] [kernels] [servers]
#
# llama.cpp is built in .cache/bench from the source package that the tests use, mistral.rs comes from
# the registry. Both can be had elsewhere already: INGOT_BENCH_LLAMA is a folder with llama-server,
# llama-bench, llama-batched-bench and llama-quantize, INGOT_BENCH_MISTRALRS a Python with mistral.rs.
# ik_llama.cpp is measured where INGOT_BENCH_IK names the folder of its binaries. INGOT_BIN is the
# server to measure, if not the one that is built here.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

repeat=5
case ${1:-} in [0-9]*) repeat=$1 && shift ;; esac
parts=${*:-kernels servers}
for part in $parts; do
    case $part in kernels | servers) ;; *) fail "there are kernels and servers to measure, no $part" ;; esac
done
folder=$root/.cache/bench
mkdir -p "$folder"

need_python
need_packages
need_rust

if [ -z "${INGOT_BIN:-}" ]; then
    build
    INGOT_BIN=$binary
fi

venv=$root/.cache/venv
llama=${INGOT_BENCH_LLAMA:-$folder/llama.cpp/build/bin}
if [ ! -x "$llama/llama-server" ]; then
    say "building llama.cpp for measuring (about ten minutes)"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    archive=$(llama_source)
    rm -rf "$folder/llama.cpp"
    mkdir "$folder/llama.cpp"
    tar -xzf "$archive" -C "$folder/llama.cpp" --strip-components 3 \
        "llama_cpp_python-$llama_version/vendor/llama.cpp"
    cmake -S "$folder/llama.cpp" -B "$folder/llama.cpp/build" -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF >"$folder/llama.cpp.log"
    cmake --build "$folder/llama.cpp/build" -j "$(nproc)" \
        --target llama-server llama-bench llama-batched-bench llama-quantize >>"$folder/llama.cpp.log"
fi

peers=(--llama "$llama")
mistralrs=${INGOT_BENCH_MISTRALRS:-$folder/mistralrs/bin/python}
if [ ! -x "$mistralrs" ]; then
    say "getting mistral.rs"
    python3 -m venv "$folder/mistralrs"
    "$mistralrs" -m pip install --quiet --disable-pip-version-check mistralrs==0.9.5 ||
        rm -r "$folder/mistralrs"
fi
[ ! -x "$mistralrs" ] || peers+=(--mistralrs-python "$mistralrs")
[ -z "${INGOT_BENCH_IK:-}" ] || peers+=(--ik "$INGOT_BENCH_IK")

say "the default model, and what llama-quantize makes of it"
default=$("$INGOT_BIN" pull smollm2:135m --data-dir "${INGOT_TEST_DATA:-$root/.cache/data}")
smollm() { echo "$folder/SmolLM2-135M-$1.gguf"; }
ln -sfn "$default" "$(smollm Q4_1)"
for type in F16 Q8_0 Q5_0 Q4_0; do
    # All from what Q4_1 stands for: only rates are measured.
    [ -f "$(smollm $type)" ] || "$llama/llama-quantize" --allow-requantize \
        "$default" "$(smollm $type)" $type 2 >"$folder/quantize.log" 2>&1
done

# Arguments: a name for the JSON file, then what bench_kernels.py should measure.
kernels() {
    local name=$1
    shift
    scripts/bench_kernels.py "${peers[@]}" --repeat "$repeat" --folder "$folder" \
        --json "$folder/$name.json" "$@"
}

servers() {
    local name=$1
    shift
    # llama-server does not draft either.
    scripts/bench_peers.py --llama-server "$llama/llama-server" --ingot "$INGOT_BIN" \
        --ingot-flags "--speculate off" --repeat "$repeat" --json "$folder/$name.json" "$@"
}

for part in $parts; do
    case $part in
    kernels)
        kernels Q4_1 --model "$(smollm Q4_1)"
        kernels 135M --rows prefill decode --model "$(smollm Q4_0)" --model "$(smollm Q5_0)" \
            --model "$(smollm Q8_0)" --model "$(smollm F16)"
        kernels 1B --rows prefill decode load --model random:Q4_K_M --model random:Q5_K_M \
            --model random:Q6_K --model random:Q8_0
        ;;
    servers)
        servers servers-Q4_1 --model "$(smollm Q4_1)"
        servers servers-Q8_0 --rows single eight --model "$(smollm Q8_0)"
        ;;
    esac
done
