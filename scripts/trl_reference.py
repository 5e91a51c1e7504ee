#!/usr/bin/env python3
"""What TRL computes from pairs of answers, for training's tests to compare with.

    trl_reference.py
        writes tests/train/trl.json: the losses of TRL's own trainers over the tiny model of
        torch_reference.py with an adapter, from the same start and pairs. CI compares with the file.

Needs what torch_reference.py needs, and trl.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models

from torch_reference import SHAPE, adapted, adapter_names, from_gguf, hashed, summary, tiny, to_gguf, weight

RATE = 5e-3
# (prompt, chosen, rejected) tokens of the pairs of a step.
LENGTHS = [(5, 6, 3), (3, 2, 7)]
STEPS = 20


def tokens(name, count):
    # 0 pads.
    return [int(x) % (SHAPE["vocab"] - 1) + 1 for x in hashed(name, count)]


def pairs():
    """Two a step, three steps' worth of them over and over."""
    for step in range(STEPS):
        for number, lengths in enumerate(LENGTHS):
            parts = ["prompt", "chosen", "rejected"]
            yield [tokens(f"{part}.{step % 3}.{number}", n) for part, n in zip(parts, lengths)]


def tokenizer():
    words = {f"t{i}": i for i in range(SHAPE["vocab"])}
    made = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="t0", eos_token="t1")


def recording(trainer):
    class Recording(trainer):
        def __init__(self, *args, **more):
            self.recorded = []
            super().__init__(*args, **more)

        def compute_loss(self, *args, **more):
            found = super().compute_loss(*args, **more)
            self.recorded.append((found[0] if isinstance(found, tuple) else found).item())
            return found

        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return Recording


def settings(folder, steps, **more):
    return dict(
        output_dir=folder,
        per_device_train_batch_size=len(LENGTHS),
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        adam_epsilon=1e-8,
        report_to=[],
        save_strategy="no",
        logging_steps=1000,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=None,
        **more,
    )


def start(model, names):
    own = dict(model.named_parameters())
    named = {ours: own[theirs] for ours, theirs in names.items()}
    with torch.no_grad():
        for name, p in named.items():
            values = weight(name, *p.shape) * np.float32(0.5)
            p.copy_(from_gguf("llama", name, torch.tensor(values)))
    return named


def noted(named):
    return {n: summary(n, to_gguf("llama", n, p)) for n, p in named.items()}


def dpo(loss, steps, attention="eager", beta=0.1):
    base, _ = tiny("llama")
    base.set_attn_implementation(attention)
    model = adapted(base, 4, 8)
    named = start(model, adapter_names(SHAPE["layers"]))
    rows = [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in pairs()]
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(**settings(folder, steps, beta=beta, loss_type=[loss], disable_dropout=True))
        trainer = recording(trl.DPOTrainer)(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        trainer.train()
    return trainer.recorded, noted(named)


def reward(centering, steps):
    import peft

    base, _ = tiny("llama")
    model = transformers.LlamaForSequenceClassification(base.config)
    model.config.num_labels, model.config.pad_token_id, model.num_labels = 1, 0, 1
    model.score = torch.nn.Linear(SHAPE["width"], 1, bias=False)
    model.model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor(weight("score.weight", 1, SHAPE["width"])))
    model = model.float().eval()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        exclude_modules=["score"],
        lora_dropout=0.0,
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    model = peft.get_peft_model(model, config)
    named = start(model, adapter_names(SHAPE["layers"]))
    rows = [dict(chosen_ids=p + c, rejected_ids=p + r) for p, c, r in pairs()]
    with tempfile.TemporaryDirectory() as folder:
        more = {} if centering is None else dict(center_rewards_coefficient=centering)
        args = trl.RewardConfig(**settings(folder, steps, disable_dropout=True, **more))
        trainer = recording(trl.RewardTrainer)(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer()
        )
        trainer.train()
    head = dict(model.named_parameters())["base_model.model.score.modules_to_save.default.weight"]
    return trainer.recorded, noted(named | {"score.weight": head})


def main():
    cases = []

    def add(kind, found, **facts):
        losses, final = found
        cases.append({"kind": kind, **facts, "losses": [float(f"{x:.9g}") for x in losses], "final": final})
        print(kind, facts, [round(x, 6) for x in losses], flush=True)

    eager, sdpa = dpo("sigmoid", STEPS), dpo("sigmoid", STEPS, "sdpa")
    gap = max(abs(a - b) for a, b in zip(eager[0], sdpa[0]))
    add("dpo", eager, loss="sigmoid", gap=gap)
    add("dpo", dpo("ipo", 3), loss="ipo")
    add("dpo", dpo("hinge", 3), loss="hinge")
    add("reward", reward(None, STEPS), centering=0.0)
    add("reward", reward(0.05, 3), centering=0.05)
    path = Path(__file__).parent.parent / "tests/train/trl.json"
    facts = {"trl": trl.__version__, "torch": torch.__version__, "learning_rate": RATE}
    path.write_text(json.dumps(facts | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
