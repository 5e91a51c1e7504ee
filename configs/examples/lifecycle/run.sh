#!/usr/bin/env bash
# The life of a model on one server: supervised fine-tuning, a reward model, GRPO with that reward model, and
# answers of the result, the best of four by the reward model.
#
#   ingot serve smollm2:135m --admin-key KEY &
#   INGOT_ADMIN_KEY=KEY configs/examples/lifecycle/run.sh
#
# INGOT: the binary (ingot). INGOT_URL: the server (http://127.0.0.1:8000). STEPS: steps of each job, for a
# short try.
set -euo pipefail
ingot=$(realpath "$(command -v "${INGOT:-ingot}")")
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
trap 'rm -f .filled-$$-*' EXIT
url=${INGOT_URL:-http://127.0.0.1:8000}
: "${INGOT_ADMIN_KEY:?set it to the --admin-key of the server}"
export INGOT_ADMIN_KEY

# Trains on the server and prints the name of what was made. The other arguments are sed expressions.
train() {
    local spec=$1
    shift
    # In this folder, because paths in a specification are relative to it.
    local filled=.filled-$$-$spec
    sed "$@" ${STEPS:+-e "s/^max_steps = .*/max_steps = $STEPS/"} -e '' "$spec" >"$filled"
    "$ingot" train "$filled" --url "$url"
}

# Asks a model of the server; the second argument is further JSON.
ask() {
    curl --silent --show-error --fail-with-body "$url/v1/chat/completions" \
        -H "Authorization: Bearer $INGOT_ADMIN_KEY" -H 'Content-Type: application/json' -d '{
            "model": "'"$1"'", "max_tokens": 60, "seed": 1,
            "messages": [{"role": "user", "content": "Write a post about our new lemon cake."}]'"${2:-}"'}' |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])'
}

echo "1. Supervised fine-tuning" >&2
voice=$(train supervised.toml -e '')
echo "2. A reward model" >&2
taste=$(train reward.toml -e '')
echo "3. GRPO with the reward model" >&2
policy=$(train policy.toml -e "s|VOICE|$voice|" -e "s|TASTE|$taste|")

echo "Before:"
ask smollm2:135m
echo "After supervised fine-tuning ($voice):"
ask "$voice"
echo "After GRPO ($policy), the best of four by $taste:"
ask "$policy" ', "best_of": 4, "reward_model": "'"$taste"'"'
