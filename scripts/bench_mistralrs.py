#!/usr/bin/env python3
"""Rates of mistral.rs for one model, for `bench_kernels.py`, under a Python that has it installed:

    RAYON_NUM_THREADS=2 python scripts/bench_mistralrs.py MODEL.gguf prefill decode eight

Prints one JSON object of tokens per second. mistral.rs 0.9.5 fails on prompts of one length that
arrive together on a CPU ("input tensor is not contiguous"), so lengths differ here.
"""

import json
import sys
import threading
import time
from pathlib import Path

from mistralrs import ChatCompletionRequest, CompletionRequest, Runner, Which


def prompt(runner, tokens):
    """A text of so many tokens; the second unit is one in models of random weights."""
    for unit in (" the", "ab"):
        if len(runner.tokenize_text(unit * tokens, False, None)) == tokens:
            return unit * tokens
    sys.exit("this vocabulary needs another prompt")


def ask(runner, tokens, output_tokens):
    request = CompletionRequest(
        model="default",
        prompt=prompt(runner, tokens),
        max_tokens=output_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    return runner.send_completion_request(request).usage


def prefill(runner):
    usage = ask(runner, 512, 1)
    return usage.prompt_tokens / usage.total_prompt_time_sec


def decode(runner):
    usage = ask(runner, 64, 65)
    # The first token comes of the prompt.
    return (usage.completion_tokens - 1) / usage.total_completion_time_sec


def streams(count, tokens):
    """Decoding of some streams, while all of them do: prompts are read one after the other."""

    def run(runner):
        answers = [
            runner.send_chat_completion_request(
                ChatCompletionRequest(
                    model="default",
                    messages=prompt(runner, 64 + index),
                    # Streams that began earlier go on until the last one is done.
                    max_tokens=tokens + 2 * (count - index),
                    temperature=0.0,
                    ignore_eos=True,
                    stream=True,
                )
            )
            for index in range(count)
        ]
        arrivals = [[] for _ in answers]

        def read(answer, times):
            times.extend(time.monotonic() for _ in answer)

        readers = [threading.Thread(target=read, args=pair) for pair in zip(answers, arrivals)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        first = max(times[0] for times in arrivals)
        last = min(times[-1] for times in arrivals)
        return sum(first < at <= last for times in arrivals for at in times) / (last - first)

    return run


WORKS = {"prefill": prefill, "decode": decode, "eight": streams(8, 32)}


def main():
    path, *works = sys.argv[1:]
    path = Path(path)
    which = Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    # Nothing may come from a cache, nor from the network.
    runner = Runner(which=which, token_source="none", prefix_cache_n=0, max_seqs=32)
    ask(runner, 16, 4)
    print(json.dumps({name: WORKS[name](runner) for name in works}))


if __name__ == "__main__":
    main()
