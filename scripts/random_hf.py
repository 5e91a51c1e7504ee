#!/usr/bin/env python3
"""Writes tiny random models as transformers saves them, one folder for each family and what is special.

    pip install torch transformers
    scripts/random_hf.py OUT

Weights, norms and biases are random, so that none can be forgotten. What Ingot makes of a folder is
compared with `check_hf.py FOLDER OURS.gguf OURS.json`. Not part of CI.
"""
import os
import sys

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = open(__file__, encoding="utf-8").read() + "In 1597 they'll SAY: \u00e9t\u00e9 \u6587\u5b57  \U0001f600 isn't\tit?\r\n\r\n"
SHAPE = dict(vocab_size=640, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)
LONG = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=128,
            short_factor=[1.0 + i / 10 for i in range(8)], long_factor=[2.0 + i for i in range(8)])
FAMILIES = {
    "llama": (t.LlamaConfig(**SHAPE), "digits"),
    "llama-31": (t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True), "threes"),
    "llama-linear-bias": (t.LlamaConfig(**SHAPE, rope_parameters=LINEAR), "gpt2"),
    "mistral": (t.MistralConfig(**SHAPE, sliding_window=None), "pieces"),
    "qwen2": (t.Qwen2Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}), "digits"),
    "qwen3-yarn": (t.Qwen3Config(**SHAPE, rope_parameters=YARN), "digits"),
    "gemma2": (t.Gemma2Config(**SHAPE, query_pre_attn_scalar=16, sliding_window=16), "pieces"),
    "gemma3": (t.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 7}, query_pre_attn_scalar=16, sliding_window=16),
               "pieces"),
    "phi3-long": (t.Phi3Config(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, rope_parameters=LONG,
                               original_max_position_embeddings=128, sliding_window=None), "digits"),
}


def tokenizer(kind):
    special = ["<pad>", "<s>", "</s>"]
    if kind == "pieces":
        own = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        own.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        # Only for training: SentencePiece's merges do not cross words either.
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, "<unk>"] + [f"<0x{b:02X}>" for b in range(256)])
        own.train_from_iterator([TEXT], trainer)
        own.pre_tokenizer = None
        import json
        plain = json.loads(own.to_str())
        plain["added_tokens"] = [a for a in plain["added_tokens"] if not a["content"].startswith("<0x")]
        own = Tokenizer.from_str(json.dumps(plain))
        own.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        own = Tokenizer(models.BPE())
        split = {"digits": CL100K % r"\p{N}", "threes": CL100K % r"\p{N}{1,3}"}.get(kind)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
        steps = [level] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), level]
        own.pre_tokenizer = pre_tokenizers.Sequence(steps)
        own.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        own.train_from_iterator([TEXT], trainer)
    if kind in ("threes", "pieces"):
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return t.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main():
    torch.manual_seed(1)
    for name, (config, kind) in FAMILIES.items():
        folder = os.path.join(sys.argv[1], name)
        if name.endswith("bias"):
            config.attention_bias = True
        model = t.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for weight, value in model.named_parameters():
                norm = weight.endswith("norm.weight") or "layernorm" in weight
                mean = 1.0 if norm and not name.startswith("gemma") else 0.0
                value.copy_(mean + torch.randn_like(value) * (0.2 if norm or value.dim() == 1 else 0.1))
        if name.endswith("bias"):
            # What a GGUF of ours has no place for.
            for layer in model.model.layers:
                layer.self_attn.o_proj.bias = None
        model.save_pretrained(folder, max_shard_size="200KB" if name == "qwen2" else "5GB")
        tokenizer(kind).save_pretrained(folder)
        # What was added to the file's own last line is left out: it must not depend on the tokenizer.
        open(os.path.join(folder, "text.txt"), "w", encoding="utf-8", newline="").write(TEXT[-1500:])
        print(name)


main()
