#!/usr/bin/env bash
# Gets the chat templates that llama.cpp ships (from the source package of llama-cpp-python), and
# what jinja2 makes of them, and the cases of llama.cpp's own test of templates. Prints the folder,
# which the tests find in INGOT_TEST_TEMPLATES.
#
# Needs a Python with pip and jinja2: INGOT_TEST_PYTHON, or .cache/venv. Does nothing if the folder is
# there already for this version.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

folder=$root/.cache/templates
python=${INGOT_TEST_PYTHON:-$root/.cache/venv/bin/python}
inside=llama_cpp_python-$llama_version/vendor/llama.cpp/models/templates
cases=llama_cpp_python-$llama_version/vendor/llama.cpp/tests/test-chat-template.cpp

# The sum of all that the reference is made from.
stamp=$({
    echo "$llama_version"
    cat "$root/tests/templates/reference.py" "$root/tests/templates/conversations.json" \
        "$root/tests/templates/llama_cases.py"
} | sha256sum | cut -d' ' -f1)
if [ "$(cat "$folder/.stamp" 2>/dev/null)" = "$stamp" ]; then
    echo "$folder"
    exit
fi

has "$python" || [ -x "$python" ] || fail "no Python at $python: set INGOT_TEST_PYTHON."
mkdir -p "$root/.cache"
work=$(mktemp -d "$root/.cache/templates.XXXXXX")
trap 'rm -rf "$work"' EXIT

archive=$(llama_source)
tar -xzf "$archive" -C "$work" "$inside" "$cases"
mkdir "$work/new"
cp "$work/$inside"/*.jinja "$work/new/"
"$python" "$root/tests/templates/reference.py" "$work/new" "$work/new/reference.json" >&2
"$python" "$root/tests/templates/llama_cases.py" "$work/$cases" "$work/new/llama_cases.json"
echo "$stamp" >"$work/new/.stamp"
rm -rf "$folder"
mv "$work/new" "$folder"
echo "$folder"
