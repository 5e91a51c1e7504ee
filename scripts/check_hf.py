#!/usr/bin/env python3
"""Compares a folder that training wrote, or that Ingot converted, with the GGUF of the same model.

    pip install torch transformers gguf
    scripts/check_hf.py FOLDER MODEL.gguf [OURS.json]

transformers reads both: the folder as it is, and the GGUF by its own conversion, which puts rows of
queries and keys back into Hugging Face's order. All tensors and the logits of a text are compared.
With - for MODEL.gguf, only the folder and OURS.json are: transformers' own conversion knows neither
stretched rope nor windows. OURS.json, {"tokens", "logits", "ids"}, is what Ingot says of the same: its
logits behind `tokens`, and its ids of the text FOLDER/text.txt. Not part of CI: the stack takes 6 GB.
"""
import json
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LIMIT = 1e-3


def main():
    folder, gguf = sys.argv[1:3]
    torch.set_num_threads(2)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    failed, theirs = False, None
    if gguf != "-":
        place, file = os.path.split(os.path.abspath(gguf))
        theirs = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype=torch.float32)
        a, b = ours.state_dict(), theirs.state_dict()
        bad = sorted(set(a) ^ set(b))
        assert not bad, f"tensors of one only: {bad}"
        worst = max(((a[name] - b[name]).abs().max().item(), name) for name in a)
        print(f"{len(a)} tensors, the largest difference {worst[0]:.2e} in {worst[1]}")
        failed = worst[0] > LIMIT
    tokens = torch.tensor([[5 + i * 37 % 250 for i in range(40)]])
    told = json.load(open(sys.argv[3])) if len(sys.argv) > 3 else None
    if told:
        tokens = torch.tensor([told["tokens"]])
    with torch.no_grad():
        x = ours(tokens).logits[0]
        y = theirs(tokens).logits[0] if theirs else x
    if theirs:
        off = (x - y).abs().max().item()
        print(f"logits of {tokens.shape[1]} tokens, folder and GGUF: {off:.2e}")
        failed |= off > LIMIT
    if told:
        off = (x[-1] - torch.tensor(told["logits"])).abs().max().item()
        print(f"logits of the last, folder and Ingot: {off:.2e}")
        failed |= off > LIMIT
    if told and os.path.exists(os.path.join(folder, "tokenizer.json")):
        text = open(os.path.join(folder, "text.txt"), encoding="utf-8", newline="").read()
        ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        same = ids == told["ids"]
        print(f"{len(ids)} ids of a text, folder and Ingot: {'the same' if same else 'DIFFERENT'}")
        failed |= not same
    sys.exit(1 if failed else 0)


main()
