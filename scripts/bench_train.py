#!/usr/bin/env python3
"""Training's speed beside PyTorch's and TRL's, in turn, on the same cores.

    bench_train.py lora|full|grpo|dpo MODEL.gguf [ROUNDS] -- COMMAND...
    bench_train.py nano [ROUNDS] -- COMMAND...

COMMAND is ours: it trains the same shape for the same number of steps, and prints a line
`step SECONDS ...` for each and, at the end, `VmHWM: KB kB`. PyTorch runs in a process of its own, in
f32, with sdpa attention and as many threads as there are cores. The first step of each run warms up.
The machine may be shared: what counts is the ratio of runs that follow each other, and its median.
Where it is, set OMP_WAIT_POLICY=passive: PyTorch's threads otherwise spin while they wait for one that
has no core, which makes it several times slower. A process of ours that uses mimalloc wants
MIMALLOC_PURGE_DELAY=-1: without it each step gives memory back and has it cleared again.

Shapes: lora and full are one row of 512 tokens that all count, LoRA of rank 16 on all linears; nano is
nanoGPT's step on characters: 4 layers, 4 heads, 128 wide, batch 12 by 64. grpo is an update with 8
completions of 64 tokens after one prompt of 256, dpo one with a pair of completions of 256 tokens after
one prompt of 256, both with the LoRA of lora. They use TRL's head, which computes log-probabilities and
entropies as GRPOTrainer and DPOTrainer do: padded sequences, each with its prompt. The reference's
log-probabilities of dpo count as computed, on both sides.

Needs torch, transformers, peft, gguf and numpy, and trl for grpo and dpo.
"""

import os
import re
import statistics
import subprocess
import sys
import time

STEPS = {"lora": 4, "full": 4, "nano": 60, "grpo": 4, "dpo": 4}
# The tokens of a step that count.
TOKENS = {"lora": 512, "full": 512, "nano": 768, "grpo": 512, "dpo": 512}


def peak():
    with open("/proc/self/status") as status:
        return next(line for line in status if line.startswith("VmHWM")).strip()


def steps_of(step, count):
    for _ in range(count):
        begun, cpu = time.time(), time.process_time()
        loss = step()
        print(f"step {time.time() - begun:.4f} cpu {time.process_time() - cpu:.4f} loss {loss:.5f}", flush=True)
    print(peak())


def model_step(kind, path):
    import torch
    from torch_reference import adapted, dequantized

    model, vocab = dequantized(path)
    model.train()
    if kind == "lora":
        model = adapted(model, 16, 32)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.01)
    tokens = torch.arange(512)[None] * 7919 % 40000 % vocab

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    return step


def completions_step(kind, path):
    """The policy part of TRL's GRPOTrainer and DPOTrainer: a forward pass with TRL's fused head over
    prompt and completion, the loss, and the backward pass."""
    import torch
    from torch_reference import adapted, dequantized
    from trl.trainer.utils import add_fused_lm_head

    model, vocab = dequantized(path)
    model.train()
    model = adapted(model, 16, 32)
    if kind == "grpo":
        add_fused_lm_head(model.get_base_model(), temperature=1.0)
    else:
        add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.01)
    rows, prompt, count = (8, 256, 64) if kind == "grpo" else (2, 256, 256)
    shared = torch.arange(prompt)[None] * 7919 % 40000 % vocab
    own = (torch.arange(count)[None] + 31 * torch.arange(rows)[:, None]) * 7919 % 40000 % vocab
    tokens = torch.cat([shared.expand(rows, -1), own], dim=1)
    mask = torch.ones_like(tokens)
    labels = tokens.clone()
    labels[:, :prompt] = -100
    signs = torch.tensor([1.0] * (rows // 2) + [-1.0] * (rows // 2))

    def step():
        optimizer.zero_grad(set_to_none=True)
        outputs = model(input_ids=tokens, attention_mask=mask, labels=labels, fused_lm_head=True)
        log_probs = outputs.log_probs[:, -count:]
        if kind == "grpo":
            ratios = torch.exp(log_probs - log_probs.detach())
            advantages = signs[:, None]
            clipped = torch.clamp(ratios, 0.8, 1.2)
            loss = -torch.min(ratios * advantages, clipped * advantages).mean()
        else:
            loss = -torch.nn.functional.logsigmoid(0.1 * (log_probs.sum(1) * signs).sum())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        return loss.item()

    return step


def nano_step():
    """GPT-2's shape: learned positions, LayerNorm, GELU, no biases, tied embeddings, no dropout."""
    import torch
    import torch.nn as nn
    import torch.nn.functional as F

    width, heads, layers, block, batch, vocab = 128, 4, 4, 64, 12, 65

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.up = nn.Linear(width, 4 * width, bias=False)
            self.down = nn.Linear(4 * width, width, bias=False)

        def forward(self, x):
            b, t, _ = x.shape
            q, k, v = self.qkv(self.norms[0](x)).split(width, 2)
            q, k, v = (y.view(b, t, heads, -1).transpose(1, 2) for y in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
            return x + self.down(F.gelu(self.up(self.norms[1](x))))

    class Nano(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(block, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm = nn.LayerNorm(width, bias=False)

        def forward(self, tokens, targets):
            x = self.blocks(self.tokens(tokens) + self.places(torch.arange(block)))
            logits = F.linear(self.norm(x), self.tokens.weight)
            return F.cross_entropy(logits.view(-1, vocab), targets.reshape(-1))

    torch.manual_seed(1)
    model = Nano()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def step():
        tokens = torch.randint(vocab, (batch, block + 1))
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measured(command):
    """Median seconds and CPU seconds of the steps after the first, and MB at most."""
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    steps = [line.split() for line in run.stdout.splitlines() if line.startswith("step ")]
    seconds = statistics.median(float(step[1]) for step in steps[1:])
    cpus = [float(step[3]) for step in steps[1:] if len(step) > 3 and step[2] == "cpu"]
    memory = re.search(r"VmHWM:\s*(\d+)", run.stdout)
    cpu = statistics.median(cpus) if cpus else float("nan")
    return seconds, cpu, int(memory[1]) / 1024 if memory else float("nan")


def main():
    args, ours = sys.argv[1:], []
    if "--" in args:
        at = args.index("--")
        args, ours = args[:at], args[at + 1 :]
    if not args or args[0] not in STEPS:
        sys.exit(__doc__)
    kind, rest = args[0], args[1:]
    model = [rest.pop(0)] if kind != "nano" else []
    if rest == ["child"]:
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        makers = {"nano": nano_step, "grpo": completions_step, "dpo": completions_step}
        make = makers.get(kind, model_step)
        steps_of(make() if kind == "nano" else make(kind, model[0]), STEPS[kind])
        return
    theirs = [sys.executable, os.path.abspath(__file__), kind, *model, "child"]
    rounds = []
    for number in range(int(rest[0]) if rest else 3):
        us, them = measured(ours), measured(theirs)
        rounds.append((us, them))
        rates = [TOKENS[kind] / seconds for seconds, _, _ in (us, them)]
        print(
            f"round {number + 1}: ours {rates[0]:.1f} tokens/s, {us[1]:.2f} CPU s a step, {us[2]:.0f} MB; "
            f"PyTorch {rates[1]:.1f}, {them[1]:.2f}, {them[2]:.0f} MB; ratio {rates[0] / rates[1]:.2f}",
            flush=True,
        )
    middle = lambda f: statistics.median(f(us, them) for us, them in rounds)
    print(
        f"median: {middle(lambda us, them: them[0] / us[0]):.2f} times PyTorch's tokens/s, "
        f"{middle(lambda us, them: them[1] / us[1]):.2f} by CPU time, "
        f"{middle(lambda us, them: us[2] / them[2]):.2f} of its memory; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
