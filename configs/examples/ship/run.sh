#!/usr/bin/env bash
# From a served model to a smaller one in its place, with a measured loss and a way back: quantization and an
# evaluation as jobs of the server, a share of the requests, all of them, and back.
#
#   ingot serve smollm2:135m --admin-key KEY &
#   INGOT_ADMIN_KEY=KEY configs/examples/ship/run.sh [MODEL]
#
# MODEL: a model of the server (smollm2:135m); of a fine-tuning job with all weights or `export.merged` its result.
# INGOT: the binary (ingot). INGOT_URL: the server (http://127.0.0.1:8000). NAME: the name that clients use
# (assistant). TYPE: the type of the smaller model (IQ4_NL). MAX_KL: the loss that is allowed. CHUNKS: chunks of the
# text, for a short try.
set -euo pipefail
ingot=$(realpath "$(command -v "${INGOT:-ingot}")")
docs=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../../docs" && pwd)
export INGOT_URL=${INGOT_URL:-http://127.0.0.1:8000}
: "${INGOT_ADMIN_KEY:?set it to the --admin-key of the server}"
export INGOT_ADMIN_KEY
model=${1:-smollm2:135m}
name=${NAME:-assistant}
type=${TYPE:-IQ4_NL}
small=$model-$type

# Sends a request and prints a field of the answer.
ask() {
    local path=$1 field=$2
    shift 2
    curl --silent --show-error --fail-with-body "$INGOT_URL$path" -H "Authorization: Bearer $INGOT_ADMIN_KEY" "$@" |
        python3 -c 'import json, sys
found = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    found = found[int(key)] if isinstance(found, list) else found[key]
print(found)' "$field"
}

json() { ask "$1" "$2" -H 'Content-Type: application/json' -d "$3"; }

echo "1. Clients ask for \`$name\`" >&2
"$ingot" publish "$name" "$model"
echo "2. A smaller model" >&2
# The default model is quantized already; a model in F16, BF16 or F32 needs no `requantize`.
job=$(json "/admin/models/$model/quantize" id '{"type": "'"$type"'", "name": "'"$small"'", "requantize": true}')
"$ingot" jobs follow "$job"
echo "3. What that cost" >&2
text=$(ask /v1/files id -F purpose=fine-tune -F "file=@$docs/operations.md")
evaluation=$(json /admin/jobs id '{"kind": "evaluate", "evaluate": {"models": ["'"$small"'"],
    "reference": "'"$model"'", "text": "'"$text"'", "chunks": '"${CHUNKS:-20}"', "max_kl": '"${MAX_KL:-0.5}"'}}')
"$ingot" jobs follow "$evaluation"
echo "The report: $INGOT_URL/admin/jobs/$evaluation/report" >&2
echo "4. A share of the requests, then all" >&2
"$ingot" publish "$name" "$small" --share 5% --evaluation "$evaluation"
"$ingot" publish "$name" "$small" --evaluation "$evaluation"
json /v1/chat/completions choices.0.message.content '{"model": "'"$name"'", "max_tokens": 30, "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}]}'
echo "5. And back" >&2
"$ingot" rollback "$name"
