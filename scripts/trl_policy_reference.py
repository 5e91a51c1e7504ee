#!/usr/bin/env python3
"""What TRL computes from completions and their advantages, for the losses' tests to compare with.

    trl_policy_reference.py PPO_TRAINER.py
        writes tests/train/policy.json, in float64. CI compares with the file.

GRPO: the loss and its gradient by the log-probabilities are those of GRPOTrainer._compute_loss itself,
of a trainer of a tiny model whose _get_per_token_logps_and_entropies answers with given numbers. The
engine's correction and the advantages are computed in the middle of _generate_and_score_completions,
which cannot be called without an engine: those statements are cut out of TRL's source and executed. As
docs/training.md has it, the KL is not weighted: use_bias_correction_kl is off (1.16 turns it on).

PPO: TRL's trainer is one loop that cannot be called in parts, and left TRL after 1.12. PPO_TRAINER.py is
trl/experimental/ppo/ppo_trainer.py of the wheel of 1.12.0 (pip download --no-deps trl==1.12.0); the
loop's statements and masked_whiten are cut out of it and executed as they stand. Where a completion ends
before the longest one, TRL puts the score on the place after its last token and keeps a value there;
Ingot puts it on the last token. So rewards and advantages are taken of each completion alone, which ends
where its row does, and the values' mask is the tokens' mask.

Needs trl 1.16, torch and transformers.
"""

import ast
import inspect
import itertools
import json
import sys
import tempfile
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from trl.trainer import grpo_trainer

CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
INVALID_LOGPROB = 1.0


class Source:
    """Statements of a file, to be found by how they begin and executed."""

    def __init__(self, text, names):
        self.tree, self.names = ast.parse(text), names

    def run(self, first, last=None, /, **given):
        """Those of one block from the one that begins with `first` to the one with `last`."""
        for node in ast.walk(self.tree):
            for field in ("body", "orelse"):
                block = getattr(node, field, None)
                lines = [ast.unparse(x) for x in block] if isinstance(block, list) else []
                start = next((i for i, x in enumerate(lines) if x.startswith(first)), None)
                if start is None:
                    continue
                end = next(i for i, x in enumerate(lines) if x.startswith(last or first) and i >= start)
                names = self.names | given
                code = ast.Module(body=block[start : end + 1], type_ignores=[])
                exec(compile(code, "trl", "exec"), names)
                return SimpleNamespace(**names)
        raise ValueError(f"TRL has no statement '{first}'")


def numbers(tensor):
    return [float(f"{x:.12g}") for x in tensor.tolist()]


def rows(tensor, lengths):
    return [numbers(row[:n]) for row, n in zip(tensor, lengths)]


def near(generator, around, spread):
    """Rounded, so that the file holds just these."""
    return (around + torch.randn(around.shape, generator=generator, dtype=around.dtype) * spread).round(decimals=4)


def start(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    policy = near(generator, torch.full(shape, -3.0, dtype=torch.float64), 0.6)
    return generator, mask, policy


def grpo_trainer_of(folder):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(8)}, unk_token="t0"))
    args = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        num_generations=4,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.GRPOTrainer(
        model=transformers.LlamaForCausalLM(config),
        reward_funcs=lambda completions, **_: [0.0 for _ in completions],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "t1"}] * 4),
        processing_class=transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1"),
    )
    trainer.use_vllm = True
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    trainer.args.use_bias_correction_kl = False
    trainer.model.train()
    return trainer


def grpo_source():
    text = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    return Source(text, vars(grpo_trainer))


def advantages(trainer, source, rewards):
    given = dict(self=trainer, rewards_per_func=torch.tensor(rewards, dtype=torch.float64)[:, None], device="cpu")
    given |= dict(num_generations=len(rewards), mode="train")
    given["unscorable_mask"] = torch.isnan(given["rewards_per_func"]).all(dim=1)
    found = source.run("if self.multi_objective_aggregation == 'sum_then", "advantages = torch.nan_to_num", **given)
    return numbers(found.advantages)


def grpo(trainer, source, batch, loss, correction, beta, moved, high):
    mask, policy, old = batch["mask"], batch["policy"].clone().requires_grad_(), batch["old"]
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer.loss_type, trainer.beta = loss, beta
    trainer.epsilon_low, trainer.epsilon_high = 0.2, 0.2 if high is None else high
    trainer.vllm_importance_sampling_mode = correction
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (policy, torch.zeros_like(policy), None)
    held = old if moved else policy.detach()
    given = dict(self=trainer, old_per_token_logps=held, sampling_per_token_logps=batch["engine"], mode="train")
    given |= dict(completion_mask=mask, tool_mask=None, device="cpu")
    when = "if self.use_vllm and self.vllm_importance_sampling_correction:\n    "
    weighted = source.run(when + "mask = ", **given)
    source.run(when + "delta = ", **(given | vars(weighted)))
    inputs = dict(
        prompt_ids=torch.zeros(len(mask), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(mask), 1, dtype=torch.long),
        completion_ids=torch.zeros_like(mask),
        completion_mask=mask,
        advantages=batch["advantages"],
        num_items_in_batch=mask.sum(),
        importance_sampling_ratio=weighted.vllm_importance_sampling_ratio,
        ref_per_token_logps=batch["reference"],
    )
    if moved:
        inputs["old_per_token_logps"] = old
    found = trainer._compute_loss(trainer.model, inputs)
    found.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {
        "settings": dict(loss=loss, correction=correction, beta=beta, epsilon_high=high),
        "old": moved,
        "loss": float(f"{found.item():.12g}"),
        "slopes": rows(policy.grad, batch["lengths"]),
        "clipped": metrics["clip_ratio/region_mean"],
        "kl": metrics.get("kl"),
        "gap": metrics["sampling/sampling_logp_difference/mean"],
        # TRL's mean is over completions if it is one weight a completion.
        "weight": metrics["sampling/importance_sampling_ratio/mean"] if correction.startswith("token") else None,
    }


def grpo_batches(trainer, source):
    # Of the second, one completion is masked for its length.
    for seed, lengths, rewards in [(1, [5, 3, 7], [1.0, 0.0, 0.25]), (2, [1, 6, 0, 4], [0.0, 2.0, 0.5, 1.5])]:
        generator, mask, policy = start(seed, lengths)
        old, reference = near(generator, policy, 0.25), near(generator, policy, 0.4)
        # Far off at a few tokens, as weights rarely come near their cap.
        engine = near(generator, policy, 0.5)
        engine[0, 0] -= 1.5
        found = advantages(trainer, source, rewards)
        # Ratios of the best one's that only the higher limit lets through, and that neither does.
        best = found.index(max(found))
        old[best, 1:3] = policy[best, 1:3] - torch.tensor([0.22, 0.4], dtype=old.dtype)
        batch = dict(lengths=lengths, mask=mask, policy=policy, old=old, engine=engine, reference=reference)
        batch["advantages"] = torch.tensor(found, dtype=torch.float64)
        axes = [["dapo", "grpo"], CORRECTIONS, [0.0, 0.04], [False, True], [None, 0.28]]
        cases = [grpo(trainer, source, batch, *case) for case in itertools.product(*axes)]
        given = {name: rows(batch[name], lengths) for name in ["policy", "old", "engine", "reference"]}
        yield given | {"rewards": rewards, "advantages": found, "cases": cases}


def ppo_batch(source, seed, lengths, **settings):
    generator, mask, policy = start(seed, lengths)
    padding = mask == 0
    args = SimpleNamespace(whiten_rewards=False, kl_estimator="k1", **settings)
    old, reference = near(generator, policy, 0.25), near(generator, policy, 0.4)
    values = near(generator, torch.zeros_like(policy), 0.6)
    fresh = near(generator, values, 0.3)
    scores = near(generator, torch.zeros(len(lengths), dtype=torch.float64), 1.0)
    estimated = {name: torch.zeros_like(policy) for name in ["rewards", "advantages", "returns"]}
    for row, length in enumerate(lengths):
        last = torch.tensor([length - 1])
        alone = {"logprobs": old, "ref_logprobs": reference, "values": values}
        given = {name: tensor[row : row + 1, :length] for name, tensor in alone.items()} | {"args": args}
        given |= dict(scores=scores[row : row + 1], sequence_lengths=last, sequence_lengths_p1=last + 1)
        rewards = source.run("logr = ", "rewards[actual_start", **given).rewards
        given |= dict(rewards=rewards, responses=torch.zeros(1, length))
        found = source.run("lastgaelam = 0", "returns = ", **given)
        for name, tensor in estimated.items():
            tensor[row, :length] = getattr(found, name)[0]
    raw = estimated["advantages"]
    whitened = source.run(
        "advantages = masked_whiten", "advantages = torch.masked_fill", advantages=raw, padding_mask=padding
    ).advantages
    policy, fresh = policy.requires_grad_(), fresh.requires_grad_()
    given = dict(args=args, padding_mask=padding, padding_mask_p1=padding, micro_batch_inds=slice(None))
    given |= dict(vpred=torch.masked_fill(fresh, padding, 0), mb_values=torch.masked_fill(values, padding, 0))
    given["new_logprobs"] = torch.masked_fill(policy, padding, INVALID_LOGPROB)
    given["mb_logprobs"] = torch.masked_fill(old, padding, INVALID_LOGPROB)
    given |= dict(mb_return=estimated["returns"], mb_advantage=whitened)
    found = source.run("vpredclipped = ", "loss = ", **given)
    found.loss.backward()
    clipped = source.run("pg_clipfrac = ", **vars(found)).pg_clipfrac
    tensors = dict(policy=policy, old=old, reference=reference, old_values=values, values=fresh) | estimated
    tensors |= dict(whitened=whitened, policy_slopes=policy.grad, value_slopes=fresh.grad)
    losses = dict(loss=found.loss, policy_loss=found.pg_loss, value_loss=found.vf_loss)
    shares = dict(clipped=clipped, value_clipped=found.vf_clipfrac)
    settings = {
        "gamma": args.gamma,
        "lambda": args.lam,
        "epsilon": args.cliprange,
        "value_clip": args.cliprange_value,
        "value_weight": args.vf_coef,
        "beta": args.kl_coef,
    }
    return {"settings": settings, "scores": numbers(scores)} | {
        **{name: rows(tensor.detach(), lengths) for name, tensor in tensors.items()},
        **{name: float(f"{tensor.item():.12g}") for name, tensor in (losses | shares).items()},
    }


def ppo_batches(path):
    text = Path(path).read_text()
    functions = {"torch": torch}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("masked_"):
            exec(compile(ast.Module(body=[node], type_ignores=[]), "trl", "exec"), functions)
    source = Source(text, functions)
    usual = dict(gamma=1.0, lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, kl_coef=0.05)
    other = dict(gamma=0.9, lam=0.8, cliprange=0.1, cliprange_value=0.4, vf_coef=0.5, kl_coef=0.2)
    for seed, lengths, settings in [(3, [5, 3, 7], usual), (4, [1, 6, 2, 4], other)]:
        yield ppo_batch(source, seed, lengths, **settings)


def main():
    with tempfile.TemporaryDirectory() as folder:
        trainer, source = grpo_trainer_of(folder), grpo_source()
        ours = [list(r) for r in ([1.0, 0.0, 0.0, 0.5], [2.0, 2.0, 2.0], [3.0], [1.0, float("nan"), 0.0])]
        groups = [dict(rewards=[None if x != x else x for x in r], advantages=advantages(trainer, source, r)) for r in ours]
        batches = list(grpo_batches(trainer, source))
    facts = {"trl": trl.__version__, "ppo": "1.12.0", "torch": torch.__version__}
    facts |= {"groups": groups, "grpo": batches, "ppo_batches": list(ppo_batches(sys.argv[1]))}
    # A case a line.
    text = json.dumps(facts).replace('{"settings"', '\n{"settings"').replace("[[", "\n[[").replace("]], ", "]],\n")
    (Path(__file__).parent.parent / "tests/train/policy.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
