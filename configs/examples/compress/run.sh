#!/usr/bin/env bash
# From a model to smaller ones with a measured loss: an importance matrix, two quantizations, and an evaluation that
# fails if the smallest lost too much.
#
#   configs/examples/compress/run.sh [MODEL [FOLDER]]
#
# MODEL: a file or a name of `ingot models` (smollm2:135m). FOLDER: where the results go (./compressed). INGOT: the
# binary (ingot). CHUNKS: chunks of the texts, for a short try. The texts are pages of Ingot's documentation: take texts
# like those that your model will read.
set -euo pipefail
ingot=${INGOT:-ingot}
model=${1:-smollm2:135m}
folder=${2:-compressed}
docs=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../../../docs" && pwd)
mkdir -p "$folder"

echo "1. The reference, in F16" >&2
# The default model is published as Q4_1 only, hence --requantize; a model in F16, BF16 or F32 does not need it.
"$ingot" quantize "$model" "$folder/reference.gguf" --type F16 --requantize --force
echo "2. An importance matrix" >&2
"$ingot" imatrix "$folder/reference.gguf" --data "$docs/training.md" --output "$folder/imatrix.gguf" --force \
    ${CHUNKS:+--chunks "$CHUNKS"}
echo "3. Smaller types" >&2
for type in Q8_0 IQ4_NL; do
    "$ingot" quantize "$folder/reference.gguf" "$folder/$type.gguf" --type "$type" --imatrix "$folder/imatrix.gguf" --force
done
echo "4. What that cost" >&2
"$ingot" eval "$folder/Q8_0.gguf" "$folder/IQ4_NL.gguf" --reference "$folder/reference.gguf" \
    --data "$docs/operations.md" --max-kl 0.5 ${CHUNKS:+--chunks "$CHUNKS"} \
    --json "$folder/evaluation.json" --html "$folder/evaluation.html"
echo "The report is $folder/evaluation.html; \`ingot serve $folder/IQ4_NL.gguf\` serves the smallest one." >&2
