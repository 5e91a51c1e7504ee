#!/usr/bin/env bash
# Formats, lints, builds and runs every test: Rust, and end to end with the official Python and
# JavaScript OpenAI clients. This is what CI runs.
#
# What the tests read: INGOT_BIN (the binary), INGOT_TEST_MODEL (the default model's file),
# INGOT_TEST_DATA (a data folder that holds it), INGOT_TEST_PYTHON (a Python with openai, jinja2,
# prometheus_client, schemathesis, jsonschema and litellm), INGOT_TEST_TEMPLATES (see templates.sh), INGOT_TEST_VOCABS (see vocabs.sh).
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
cd "$root"

# The server's own variables must not change what is tested.
for name in "${!INGOT_@}"; do
    case $name in INGOT_TEST_* | INGOT_CI_*) ;; *) unset "$name" ;; esac
done

passed=0
failed=0
failures=()
seconds=()
log=$(mktemp)
trap 'rm -f "$log" "$log.downloads"' EXIT

# The processor seconds of this shell's ended children: less than twice a suite's seconds on two
# cores says that the suite waits.
cpu() { awk -v hertz="$(getconf CLK_TCK)" '{ print int(($16 + $17) / hertz) }' /proc/$$/stat; }

timed() {
    seconds+=("$((SECONDS - $2)) $(($(cpu) - $3)) $1")
}

# Counts a command as one test.
check() {
    local name=$1 start=$SECONDS before
    before=$(cpu)
    shift
    say "$name"
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        failures+=("$name")
    fi
    timed "$name" "$start" "$before"
}

# Runs a command whose output counts its tests as `N passed` and `N failed`, on one line or many.
suite() {
    local name=$1 status=0 start=$SECONDS before good bad
    before=$(cpu)
    shift
    say "$name"
    "$@" 2>&1 | tee "$log" || status=$?
    good=$(grep -oE '[0-9]+ passed' "$log" | awk '{ n += $1 } END { print n + 0 }' || true)
    bad=$(grep -oE '[0-9]+ failed' "$log" | awk '{ n += $1 } END { print n + 0 }' || true)
    # A program that counts nothing is one test; one that fails has at least one failure.
    [ "$good" -gt 0 ] || [ "$bad" -gt 0 ] || [ "$status" -ne 0 ] || good=1
    [ "$bad" -gt 0 ] || [ "$status" -eq 0 ] || bad=1
    passed=$((passed + good))
    failed=$((failed + bad))
    [ "$bad" -eq 0 ] || failures+=("$name")
    timed "$name" "$start" "$before"
}

finish() {
    say "seconds and processor seconds of each suite"
    printf '%s\n' "${seconds[@]}" | sort -rn
    for name in "${failures[@]}"; do
        say "failed: $name"
    done
    printf '%d passed, %d failed\n' "$passed" "$failed"
    [ "$failed" -eq 0 ]
    exit
}

need_python
need_node
need_packages
need_browser
need_rust

# What the tests need from package registries, in .cache.
downloads() {
    say "Python packages for the tests"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        openai jinja2 prometheus_client 'schemathesis>=4,<5' jsonschema litellm
    say "Node packages for the tests"
    mkdir -p "$root/.cache/node"
    npm install --silent --no-audit --no-fund --no-package-lock --prefix "$root/.cache/node" openai
    # Modules resolve from the folder of the file that imports them, upwards.
    ln -sfn .cache/node/node_modules "$root/node_modules"
    say "chat templates and what jinja2 makes of them"
    scripts/templates.sh
    say "llama.cpp's test vocabularies"
    scripts/vocabs.sh
}

venv=$root/.cache/venv
export INGOT_TEST_PYTHON=$venv/bin/python
# Downloads wait for the network, lints and the build for the CPU: they run side by side.
(downloads) >"$log.downloads" 2>&1 &
downloading=$!

check "rustfmt" cargo fmt --check
check "clippy" cargo clippy --release --all-targets --locked -- -D warnings
check "documentation" env RUSTDOCFLAGS="-D warnings" \
    cargo doc --release --no-deps --lib --locked --quiet
check "build" build
[ "$failed" -eq 0 ] || [ -x "$binary" ] || finish

export INGOT_BIN=$binary
export INGOT_TEST_DATA=${INGOT_TEST_DATA:-$root/.cache/data}
say "getting the default model"
if model=$("$binary" pull smollm2:135m --data-dir "$INGOT_TEST_DATA"); then
    export INGOT_TEST_MODEL=$model
    passed=$((passed + 1))
else
    failed=$((failed + 1))
    failures+=("pull of the default model")
fi

say "waiting for the other downloads"
if wait "$downloading"; then
    passed=$((passed + 1))
else
    cat "$log.downloads" >&2
    failed=$((failed + 1))
    failures+=("downloads of what the tests need")
fi
export INGOT_TEST_TEMPLATES=$root/.cache/templates
export INGOT_TEST_VOCABS=$root/.cache/vocabs

suite "Rust tests" cargo test --release --locked --no-fail-fast

shopt -s nullglob
for file in tests/e2e/*.py; do
    # Modules that the tests import begin with an underscore or are called conftest.
    case ${file##*/} in _* | conftest.py) continue ;; esac
    suite "$file" "$INGOT_TEST_PYTHON" "$file"
    # The document is held against the mock runner; README describes the default runner.
    case ${file##*/} in test_document.py | test_readme.py) continue ;; esac
    INGOT_RUNNER=llama-cpp suite "$file, llama.cpp" "$INGOT_TEST_PYTHON" "$file"
done
for file in tests/e2e/*.mjs; do
    case ${file##*/} in _*) continue ;; esac
    suite "$file" node "$file"
done

finish
