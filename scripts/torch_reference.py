#!/usr/bin/env python3
"""What PyTorch, transformers and PEFT compute, for training's tests to compare with.

    torch_reference.py fixtures
        writes tests/train/torch.json: gradients of single operations, and the losses, gradients and
        results of tiny models. CI compares with the file; the stack is not needed there.
    torch_reference.py model MODEL.gguf DATA.jsonl FOLDER [STEPS [LENGTH [HELD_OUT]]]
        trains an adapter of a real model with PEFT, 20 steps of 128 tokens: FOLDER gets the batches,
        the adapter as it was before and after, the losses, and those of HELD_OUT (4) more rows every
        ten steps.
    torch_reference.py interop MODEL.gguf FOLDER
        loads the adapter that our training wrote to FOLDER/ours with PEFT, and compares its logits
        with ours.

Needs torch, transformers, peft, safetensors, gguf and numpy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
# Gemma has four norms a layer, and other names for them.
GEMMA = MODULES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TARGETS = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


# Numbers that both sides make.


def hashed(name, count):
    """`count` numbers of 32 bits: FNV-1a of the name, then the finalizer of MurmurHash3."""
    seed = 2166136261
    for byte in name.encode():
        seed = (seed ^ byte) * 16777619 & 0xFFFFFFFF
    z = np.uint32(seed) + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9)
    z = (z ^ (z >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    z = (z ^ (z >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return z ^ (z >> np.uint32(16))


def uniform(name, *shape):
    """Between -1 and 1, in f64."""
    count = int(np.prod(shape))
    return (hashed(name, count).astype(np.float64) / 2**31 - 1.0).reshape(shape)


def weight(name, *shape):
    """A matrix whose products keep the size of what they multiply; a norm around 1. f32."""
    values = uniform(name, *shape)
    values = 1 + 0.2 * values if len(shape) == 1 else values * np.sqrt(3 / shape[-1])
    return values.astype(np.float32)


def tensor(name, *shape, scale=1.0):
    return torch.tensor(uniform(name, *shape) * scale, dtype=torch.float64, requires_grad=True)


def digits(values, count=10):
    return [float(f"{x:.{count}g}") for x in values.detach().double().flatten().tolist()]


# Single operations, in f64.


def operation(cases, name, args, out, **facts):
    """Notes the result, and the arguments' gradients of its product with hashed numbers."""
    grad = torch.tensor(uniform(name + ".grad", *out.shape))
    grads = torch.autograd.grad(out, args, grad)
    cases[name] = facts | {"out": digits(out), "grads": [digits(grad) for grad in grads]}


def rotated(x, halves):
    """Rotary positions of (rows, heads, dim), base 10,000."""
    rows, _, dim = x.shape
    rate = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(rows, dtype=torch.float64)[:, None, None] * rate
    a, b = (x[..., : dim // 2], x[..., dim // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
    pair = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
    return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)


def attended(q, k, v, starts, window, cap, scale):
    """Causal attention inside documents: (rows, heads, dim)."""
    rows, heads, _ = q.shape
    at = torch.arange(rows)
    document = torch.bucketize(at, torch.tensor(starts), right=True)
    seen = (document[:, None] == document) & (at[:, None] >= at)
    if window:
        seen &= at[:, None] - at < window
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (k, v))
    if cap is None:
        out = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, seen, scale=scale)
    else:
        scores = q.transpose(0, 1) @ k.transpose(1, 2) * scale
        scores = (cap * torch.tanh(scores / cap)).masked_fill(~seen, float("-inf"))
        out = scores.softmax(-1) @ v
    return out.transpose(0, 1)


def operations():
    cases = {}
    x, w = tensor("norm.x", 5, 24), tensor("norm.w", 24)
    operation(cases, "rms_norm", [x, w], F.rms_norm(x, (24,), w, 1e-5))
    x = tensor("rope.x", 7, 3, 8)
    for halves in (False, True):
        name = "rope.halves" if halves else "rope.neighbours"
        operation(cases, name, [x], rotated(x, halves))
    gate, up = tensor("gate", 4, 20, scale=4.0), tensor("up", 4, 20)
    operation(cases, "swiglu", [gate, up], F.silu(gate) * up)
    operation(cases, "geglu", [gate, up], F.gelu(gate, approximate="tanh") * up)
    q, k, v = tensor("attention.q", 70, 2, 4), tensor("attention.k", 70, 1, 4), tensor("attention.v", 70, 1, 4)
    for name, starts, window, cap in [
        ("attention.documents", [0, 1, 9, 66], None, None),
        ("attention.window", [0, 30], 11, None),
        ("attention.cap", [0], None, 0.5),
    ]:
        out = attended(q, k, v, starts, window, cap, 0.6)
        operation(cases, name, [q, k, v], out, documents=starts, window=window, cap=cap)
    x, w = tensor("linear.x", 6, 32), tensor("linear.w", 10, 32)
    operation(cases, "linear", [x, w], F.linear(x, w))
    a, b = tensor("lora.a", 3, 32), tensor("lora.b", 10, 3)
    base = torch.tensor(weight("lora.base", 10, 32)).double()
    operation(cases, "lora_linear", [x, a, b], F.linear(x, base) + 0.7 * F.linear(F.linear(x, a), b))
    table = tensor("embedding.table", 9, 6)
    rows = torch.tensor([3, 1, 3, 0, 8, 3])
    operation(cases, "embedding", [table], F.embedding(rows, table), tokens=rows.tolist())
    hidden, head = tensor("loss.hidden", 12, 32), tensor("loss.head", 17, 32)
    targets, weights = torch.arange(12) * 5 % 17, torch.tensor([0.0, 1.0, 0.5] * 4).double()
    for cap in (None, 2.0):
        logits = hidden @ head.T
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        name = "cross_entropy" if cap is None else "cross_entropy.cap"
        operation(cases, name, [hidden, head], loss, cap=cap)
    return cases


# Models.

SHAPE = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "ff": 64, "vocab": 61}
WINDOW = 5
LENGTHS = [13, 9]


def tiny(architecture):
    """transformers' model, in f32, with hashed weights; and where each GGUF tensor is in it."""
    import transformers as t

    s = SHAPE
    common = dict(
        vocab_size=s["vocab"],
        hidden_size=s["width"],
        intermediate_size=s["ff"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["head_dim"],
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=architecture != "llama",
        attn_implementation="eager",
    )
    if architecture == "llama":
        config = t.LlamaConfig(**common, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
        model = t.LlamaForCausalLM(config)
    elif architecture == "qwen3":
        config = t.Qwen3Config(**common, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
        model = t.Qwen3ForCausalLM(config)
    else:
        kinds = ["sliding_attention", "full_attention"]
        rope = {
            "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
            "full_attention": dict(rope_type="default", rope_theta=1000000.0),
        }
        config = t.Gemma3TextConfig(
            **common,
            layer_types=kinds,
            sliding_window=WINDOW,
            pad_token_id=None,  # whose row of the table would have no gradient
            rope_parameters=rope,
            query_pre_attn_scalar=s["head_dim"],
            hidden_activation="gelu_pytorch_tanh",
        )
        model = t.Gemma3ForCausalLM(config)
    model = model.float().eval()
    names = {}
    modules = GEMMA if architecture == "gemma3" else MODULES
    own = dict(model.named_parameters())
    for layer in range(s["layers"]):
        for part, module in modules.items():
            theirs = f"model.layers.{layer}.{module}.weight"
            if theirs in own and part in modules:
                names[f"blk.{layer}.{part}.weight"] = theirs
    names |= {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if architecture == "llama":
        names["output.weight"] = "lm_head.weight"
    assert sorted(names.values()) == sorted(own), sorted(set(own) ^ set(names.values()))
    with torch.no_grad():
        for ours, theirs in names.items():
            values = torch.tensor(weight(ours, *own[theirs].shape))
            own[theirs].copy_(from_gguf(architecture, ours, values))
    return model, names


def heads_of(architecture, name, shape=SHAPE):
    """Heads whose rows GGUF keeps as neighbours, transformers as halves."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if architecture != "llama":
        return None
    return {"attn_q": shape["heads"], "attn_k": shape["kv_heads"]}.get(part)


def from_gguf(architecture, name, x, shape=SHAPE):
    heads = heads_of(architecture, name, shape)
    if architecture == "gemma3" and "norm" in name:
        return x - 1  # its norms multiply by 1 + weight
    if heads is None or name.endswith("lora_a"):
        return x
    return x.reshape(heads, -1, 2, x.shape[-1]).transpose(1, 2).reshape(x.shape)


def to_gguf(architecture, name, x, shape=SHAPE, values=True):
    heads = heads_of(architecture, name, shape)
    if architecture == "gemma3" and "norm" in name and values:
        return x + 1
    if heads is None or name.endswith("lora_a"):
        return x
    return x.reshape(heads, 2, -1, x.shape[-1]).transpose(1, 2).reshape(x.shape)


def batch(step, vocab):
    """Documents of hashed tokens; the third token of the first one does not count."""
    documents = []
    for number, length in enumerate(LENGTHS):
        tokens = hashed(f"tokens.{step}.{number}", length) % np.uint32(vocab)
        counts = np.ones(length, dtype=np.float32)
        counts[-1] = 0
        counts[2] = 0 if number == 0 else 1
        documents.append((torch.tensor(tokens.astype(np.int64)), torch.tensor(counts)))
    return documents


def loss_of(model, documents):
    """Mean over what counts; each document by itself."""
    total, count = 0.0, 0.0
    for tokens, counts in documents:
        logits = model(input_ids=tokens[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        total = total + (losses * counts[:-1]).sum()
        count += counts[:-1].sum()
    return total / count


def train(model, named, batches, rate, decays, before=lambda step: None):
    """PEFT's or transformers' model with PyTorch's AdamW; losses, norms, gradients of step 1."""
    groups = [
        {"params": [p for n, p in named.items() if decays(n)], "weight_decay": 0.01},
        {"params": [p for n, p in named.items() if not decays(n)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.999), eps=1e-8)
    losses, norms, first = [], [], {}
    for step, documents in enumerate(batches):
        before(step)
        optimizer.zero_grad()
        loss = loss_of(model, documents)
        loss.backward()
        if not first:
            first = {name: p.grad.clone() for name, p in named.items()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)))
        optimizer.step()
        losses.append(loss.item())
        print(f"step {len(losses)}: {losses[-1]:.6f}", file=sys.stderr, flush=True)
    return losses, norms, first


def adapted(model, rank, alpha):
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[MODULES[t].split(".")[-1] for t in TARGETS],
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config).eval()


def adapter_names(layers):
    names = {}
    for layer in range(layers):
        for part in TARGETS:
            for half in "ab":
                module = f"base_model.model.model.layers.{layer}.{MODULES[part]}"
                name = f"blk.{layer}.{part}.weight.lora_{half}"
                names[name] = f"{module}.lora_{half.upper()}.default.weight"
    return names


def summary(name, x):
    """Enough to find any difference, without all of the numbers."""
    flat = x.detach().double().flatten()
    direction = torch.tensor(uniform(name + ".direction", flat.numel()))
    return {
        "norm": float(f"{float(flat.norm()):.10g}"),
        "along": float(f"{float(flat @ direction):.10g}"),
        "first": digits(flat[:8], 9),
    }


def whole(_, x):
    return digits(x, 9)


def case(architecture, full, steps):
    model, names = tiny(architecture)
    rate = 2e-3 if full else 1e-2
    if not full:
        model = adapted(model, 4, 8)
        names = adapter_names(SHAPE["layers"])
    own = dict(model.named_parameters())
    named = {ours: own[theirs] for ours, theirs in names.items()}
    if not full:
        with torch.no_grad():
            for name, p in named.items():
                start = weight(name, *p.shape) * np.float32(0.5)
                p.copy_(from_gguf(architecture, name, torch.tensor(start)))
    batches = [batch(step % 3, SHAPE["vocab"]) for step in range(steps)]
    losses, norms, first = train(model, named, batches, rate, lambda name: named[name].dim() > 1)
    note = summary if full or architecture != "llama" else whole
    # A gradient is not moved by the one that is added to Gemma's norms.
    grads = {n: note(n, to_gguf(architecture, n, g, values=False)) for n, g in first.items()}
    final = {n: note(n, to_gguf(architecture, n, p)) for n, p in named.items()}
    return {
        "architecture": architecture,
        "training": "full" if full else "lora",
        "learning_rate": rate,
        "losses": [float(f"{x:.9g}") for x in losses],
        "norms": [float(f"{x:.9g}") for x in norms],
        "grads": grads,
        "final": final,
    }


def fixtures():
    import peft
    import transformers

    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    cases = [("llama", False, 20), ("llama", True, 20)]
    cases += [(a, full, 5) for a in ("qwen3", "gemma3") for full in (False, True)]
    models = [case(*each) for each in cases]
    made = {"made_by": "scripts/torch_reference.py fixtures", "versions": versions}
    made |= {"shape": SHAPE, "window": WINDOW, "operations": operations(), "models": models}
    path = Path(__file__).parent.parent / "tests/train/torch.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(made, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(path.name, path.stat().st_size, "bytes")
    for model in models:
        print(model["architecture"], model["training"], model["losses"][0], model["losses"][-1])


# Real models.


def dequantized(path):
    """The numbers of a Llama GGUF as transformers' model, in f32, and its vocabulary."""
    import gguf
    import transformers as t

    file = gguf.GGUFReader(path)
    key = lambda name: file.fields["llama." + name].contents()
    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    vocab = int(tensors["token_embd.weight"].shape[1])
    config = t.LlamaConfig(
        vocab_size=vocab,
        hidden_size=key("embedding_length"),
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=float(key("attention.layer_norm_rms_epsilon")),
        rope_parameters=dict(rope_type="default", rope_theta=float(key("rope.freq_base"))),
        max_position_embeddings=key("context_length"),
        tie_word_embeddings="output.weight" not in tensors,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = t.LlamaForCausalLM(config).float().eval()
    own = dict(model.named_parameters())
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    names |= {"output.weight": "lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        for part, module in MODULES.items():
            names[f"blk.{layer}.{part}.weight"] = f"model.layers.{layer}.{module}.weight"
    shape = {"heads": heads, "kv_heads": kv_heads}
    with torch.no_grad():
        for name, tensor in tensors.items():
            values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            values = torch.from_numpy(values.copy()).reshape(own[names[name]].shape)
            own[names[name]].copy_(from_gguf("llama", name, values, shape))
    return model, vocab


def rows_of_text(path, data, count, length):
    """Rows of so many tokens of the data's questions and answers, by the model's own tokenizer."""
    from transformers import AutoTokenizer

    path = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokens = []
    for line in open(data):
        example = json.loads(line)
        tokens += tokenizer(example["question"] + "\n" + example["answer"] + "\n\n").input_ids
        if len(tokens) >= count * length:
            return [tokens[at * length :][:length] for at in range(count)]
    sys.exit(f"{data} has only {len(tokens)} tokens")


def model(path, data, folder, steps=20, length=128, held_out=4):
    """Two documents a step, of `length` tokens together; what counts is all but the first of each."""
    from safetensors.torch import save_file

    steps, length, held_out = int(steps), int(length), int(held_out)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base, _ = dequantized(path)
    config = base.config
    shape = {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
    torch.manual_seed(7)
    peft_model = adapted(base, 16, 32)
    names = adapter_names(config.num_hidden_layers)
    own = dict(peft_model.named_parameters())
    named = {ours: own[theirs] for ours, theirs in names.items()}
    noted = lambda: {n: to_gguf("llama", n, p.detach(), shape).contiguous() for n, p in named.items()}
    save_file(noted(), folder / "before.safetensors")
    rows = rows_of_text(path, data, steps + held_out, length)
    split = length * 3 // 5
    batches = []
    for row in rows:
        documents = [row[:split], row[split:]]
        counts = [[1.0] * (len(document) - 1) + [0.0] for document in documents]
        batches.append([(torch.tensor(d), torch.tensor(c)) for d, c in zip(documents, counts)])
    found = []

    def evaluate(step):
        if step % 10 == 0 or step == steps:
            with torch.no_grad():
                each = [loss_of(peft_model, batch).item() for batch in batches[steps:]]
            found.append([step, float(np.mean(each))])
            print(f"held out at step {step}: {found[-1][1]:.6f}", file=sys.stderr, flush=True)

    losses, norms, _ = train(peft_model, named, batches[:steps], 2e-4, lambda _: True, evaluate)
    evaluate(steps)
    save_file(noted(), folder / "after.safetensors")
    run = {"rows": rows, "documents": [0, split], "losses": losses, "norms": norms, "rank": 16, "alpha": 32.0}
    (folder / "run.json").write_text(json.dumps(run | {"learning_rate": 2e-4, "held_out": found}))
    print("losses", " ".join(f"{loss:.5f}" for loss in losses))


def interop(path, folder):
    """`folder`: `run.json`, ours' adapter in `ours/`, and its logits of the first row's first document."""
    import peft
    from safetensors.torch import load_file

    folder = Path(folder)
    base, _ = dequantized(path)
    loaded = peft.PeftModel.from_pretrained(base, folder / "ours").eval()
    run = json.loads((folder / "run.json").read_text())
    tokens = torch.tensor(run["rows"][0][: run["documents"][1]])[None]
    with torch.no_grad():
        theirs = loaded(input_ids=tokens).logits[0]
        with loaded.disable_adapter():
            plain = loaded(input_ids=tokens).logits[0]
    ours = load_file(folder / "logits.safetensors")["logits"]
    apart = (ours - theirs).abs().max().item()
    moved = (plain - theirs).abs().max().item()
    print(f"logits are {apart:.2e} apart at most; the adapter moves them by up to {moved:.2f}")
    if not apart < 1e-3 or not moved > 0.1:
        sys.exit("they are too far apart, or the adapter does nothing")


def main():
    verbs = {"fixtures": fixtures, "model": model, "interop": interop}
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    verbs[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
