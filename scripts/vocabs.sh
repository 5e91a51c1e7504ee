#!/usr/bin/env bash
# Gets the vocabularies that llama.cpp ships for its tests (from the source package of
# llama-cpp-python), with the texts and tokens beside them. Prints the folder, which the tests find in
# INGOT_TEST_VOCABS. Does nothing if the folder is there already for this version.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

folder=$root/.cache/vocabs
inside=llama_cpp_python-$llama_version/vendor/llama.cpp/models

if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$llama_version" ]; then
    echo "$folder"
    exit
fi

archive=$(llama_source)
work=$(mktemp -d "$root/.cache/vocabs.XXXXXX")
trap 'rm -rf "$work"' EXIT
tar -xzf "$archive" -C "$work" --wildcards "$inside/ggml-vocab-*"
echo "$llama_version" >"$work/$inside/.stamp"
rm -rf "$folder"
mv "$work/$inside" "$folder"
echo "$folder"
