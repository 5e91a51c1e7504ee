#!/usr/bin/env python3
"""Ingot against llama-server on this machine: same model file, same threads, in turn in one run.

    scripts/bench_peers.py --llama-server PATH --model FILE [--model FILE …] [--repeat 5] [--rows …]

Both servers are up at the same time (an idle one uses no CPU) and are loaded in turn, by
`ingot bench serve` or, where requests name adapters in different ways, by this script; prompts differ
from one repetition to the next, so that nothing is cached from an earlier one. llama-server is run
with several sets of flags per row; its best median counts, and those that the first repetition shows
to be a fifth behind its best are not run again. Prints a Markdown table of medians; --json keeps
everything. Kernels alone are `bench_kernels.py`'s.
"""

import argparse
import contextlib
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import random_lora

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = 8


@dataclass(frozen=True)
class Row:
    title: str
    # Arguments of `ingot bench serve`; None: a client for each adapter, all at once.
    load: str
    # The figure of its report.
    figure: tuple
    # llama-server's sets of flags.
    variants: dict
    more_is_better: bool = True


ROWS = {
    "single": Row(
        "1 client, 80-word prompts, 128 tokens out: output tokens/s",
        "--concurrency 1 --requests 3 --prompt-words 80 --output-tokens 128 --ignore-eos",
        ("output_tokens_per_second",),
        {"-np 1": "-np 1 -c 8192 -fa on", "-np 1 -fa off": "-np 1 -c 8192 -fa off"},
    ),
    "eight": Row(
        "8 clients, 80-word prompts, 64 tokens out: total tokens/s",
        "--concurrency 8 --requests 8 --prompt-words 80 --output-tokens 64 --ignore-eos",
        ("total_tokens_per_second",),
        {
            "-np 8": "-np 8 -c 16384 -fa on",
            "-np 8 -fa off": "-np 8 -c 16384 -fa off",
            "-np 8 -kvu": "-np 8 -c 16384 -fa on -kvu",
        },
    ),
    "shared": Row(
        "8 clients together, 1,000 shared tokens, 32 out: output tokens/s",
        "--concurrency 8 --requests 8 --arrive-together --shared-prefix-tokens 1000"
        " --prompt-words 10 --output-tokens 32 --ignore-eos --warmup 0",
        ("output_tokens_per_second",),
        {
            "-np 8": "-np 8 -c 16384 -fa off",
            "-np 1": "-np 1 -c 8192 -fa on",
            "-np 1 -fa off": "-np 1 -c 8192 -fa off",
        },
    ),
    "probe": Row(
        "4 streams while a 4,000-token prompt arrives: p99 inter-token latency, ms",
        "--concurrency 4 --probe-prompt-tokens 4000 --prompt-words 20 --output-tokens 500 --ignore-eos",
        ("during_ms", "p99"),
        {
            "-b 256": "-np 5 -c 40960 -fa on -b 256 -ub 256",
            "-b 64": "-np 5 -c 40960 -fa on -b 64 -ub 64",
            "-b 64 -fa off": "-np 5 -c 40960 -fa off -b 64 -ub 64",
        },
        more_is_better=False,
    ),
    "adapters": Row(
        f"{ADAPTERS} clients at once, each with its own adapter of rank {random_lora.RANK}"
        " (all linear layers), 80-word prompts, 64 out: output tokens/s",
        None,
        ("output_tokens_per_second",),
        {
            "-np 8": "-np 8 -c 16384 -fa on",
            "-np 8 -fa off": "-np 8 -c 16384 -fa off",
            # Requests with different adapters are not computed together there, so one slot is no loss.
            "-np 1": "-np 1 -c 8192 -fa on",
            "-np 1 -fa off": "-np 1 -c 8192 -fa off",
        },
    ),
    "prompt-heavy": Row(
        "8 clients, 1,500-token prompts, 32 out: total tokens/s",
        "--concurrency 8 --requests 8 --prompt-tokens 1500 --output-tokens 32 --ignore-eos --warmup 0",
        ("total_tokens_per_second",),
        {
            "-np 8": "-np 8 -c 16384 -fa on",
            "-np 8 -fa off": "-np 8 -c 16384 -fa off",
        },
    ),
    "chat-heavy": Row(
        "8 clients, 200-token prompts, 200 out, 16 requests: output tokens/s",
        "--concurrency 8 --requests 16 --prompt-tokens 200 --output-tokens 200 --ignore-eos",
        ("output_tokens_per_second",),
        {
            "-np 8": "-np 8 -c 16384 -fa on",
            "-np 8 -fa off": "-np 8 -c 16384 -fa off",
        },
    ),
}

# Any will do: about a token each.
WORDS = """the of and to in a is that for it as was with be by on not he his but at are this have from or
had an they which one you were her all she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time these"""


class Server:
    def __init__(self, name, command, url, log):
        self.name = name
        self.log = log
        out = subprocess.PIPE if url is None else log
        self.process = subprocess.Popen(command, stdout=out, stderr=log, text=url is None)
        self.url = url or self.find_url()
        self.wait()

    def find_url(self):
        for line in self.process.stdout:
            found = re.search(r"http://[0-9.]+:[0-9]+", line)
            if found:
                return found.group()
        self.fail("ended before it listened")

    def wait(self):
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health") as answer:
                if answer.status == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.fail("did not become ready")

    def fail(self, what):
        self.stop()
        self.log.seek(0)
        sys.exit(f"{self.log.read().decode(errors='replace')[-4000:]}\n{self.name} {what}")

    def stop(self):
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def running(name, command, url=None):
    with tempfile.TemporaryFile() as log:
        server = Server(name, command, url, log)
        try:
            yield server
        finally:
            server.stop()


def measure(options, server, load, seed):
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [options.ingot, "bench", "serve", "--url", server.url, *shlex.split(load)]
        command += ["--seed", str(seed), "--json", report.name]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{server.name}: {done.stdout}{done.stderr}")
        return json.loads(Path(report.name).read_bytes())


def ask(server, adapter, prompt, output_tokens):
    """One answer by an adapter: its number of tokens."""
    body = {
        "model": f"a{adapter}",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if server.name != "ingot":
        body["lora"] = [{"id": adapter, "scale": 1.0}]
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def measure_adapters(server, seed):
    """A report as `ingot bench serve` makes it, of a client for each adapter, all at once."""
    source, words = random.Random(seed), WORDS.split()
    warmup, *prompts = (" ".join(source.choices(words, k=80)) for _ in range(1 + ADAPTERS))
    ask(server, 0, warmup, 8)
    with ThreadPoolExecutor(ADAPTERS) as clients:
        began = time.monotonic()
        tokens = sum(clients.map(lambda i: ask(server, i, prompts[i], 64), range(ADAPTERS)))
        seconds = time.monotonic() - began
    return {"median": {"output_tokens_per_second": tokens / seconds}}


def value(report, path):
    """The figure at `path` of the report, wherever the median run is kept."""
    node = report["median"] or report["median_probe"]
    for key in path:
        node = node[key]
    return float(node)


def start_servers(options, model, row, stack):
    """Both sides, llama-server once for each set of flags; the stack stops them."""
    ingot = [options.ingot, "serve", model, "--port", "0", "--threads", str(options.threads)]
    ingot += ["--data-dir", options.data_dir, *shlex.split(options.ingot_flags)]
    llama = [options.llama_server, "-m", model, "-t", str(options.threads), "--host", "127.0.0.1"]
    if row.load is None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ingot-adapters-"))
        paths = random_lora.write_all(model, folder, ADAPTERS)
        for index, path in enumerate(paths):
            ingot += ["--adapter", f"a{index}={path}"]
        llama += ["--lora", ",".join(map(str, paths)), "--lora-init-without-apply"]

    servers = [stack.enter_context(running("ingot", ingot))]
    for port, (name, flags) in enumerate(row.variants.items(), options.port):
        command = [*llama, "--port", str(port), *shlex.split(flags)]
        servers.append(stack.enter_context(running(name, command, f"http://127.0.0.1:{port}")))
    return servers


def in_the_race(row, figures, server):
    if server.name == "ingot":
        return True
    first = {name: values[0] for name, values in figures.items() if name != "ingot"}
    if row.more_is_better:
        return first[server.name] >= 0.8 * max(first.values())
    return first[server.name] <= min(first.values()) / 0.8


def run_row(options, model, name):
    row = ROWS[name]
    with contextlib.ExitStack() as stack:
        servers = start_servers(options, model, row, stack)
        figures = {server.name: [] for server in servers}
        for repetition in range(options.repeat):
            turn = servers if repetition % 2 == 0 else servers[::-1]
            for server in turn:
                seed = options.seed + repetition
                if row.load is None:
                    report = measure_adapters(server, seed)
                else:
                    report = measure(options, server, row.load, seed)
                figures[server.name].append(value(report, row.figure))
                print(f"{name} {repetition} {server.name}: {figures[server.name][-1]:.2f}", flush=True)
            servers = [server for server in servers if in_the_race(row, figures, server)]
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ours = medians.pop("ingot")
    best = (max if row.more_is_better else min)(medians, key=medians.get)
    return {
        "model": Path(model).name,
        "row": name,
        "title": row.title,
        "ingot": ours,
        "llama_server": medians,
        "best": best,
        "ratio": ours / medians[best],
        "runs": figures,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--ingot", default=str(ROOT / "target/release/ingot"))
    parser.add_argument("--ingot-flags", default="")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=18400)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--data-dir", default=tempfile.mkdtemp(prefix="ingot-bench-"))
    parser.add_argument("--json")
    options = parser.parse_args()
    results = []
    for model in options.model:
        for row in options.rows:
            results.append(run_row(options, model, row))
            if options.json:
                Path(options.json).write_text(json.dumps(results, indent=1))
    print("\n| model | work | ingot | llama-server (best flags) | ratio |\n|---|---|---|---|---|")
    for result in results:
        theirs = result["llama_server"][result["best"]]
        print(
            f"| {result['model']} | {result['title']} | {result['ingot']:.1f} "
            f"| {theirs:.1f} (`{result['best']}`) | {result['ratio']:.2f}× |"
        )


if __name__ == "__main__":
    main()
