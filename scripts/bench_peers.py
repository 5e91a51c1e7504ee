#!/usr/bin/env python3
"""Ingot against llama-server on this machine: same model file, same threads, in turn in one run.

    scripts/bench_peers.py --llama-server PATH --model FILE [--model FILE …] [--repeat 5] [--rows …]

Both servers are up at the same time (an idle one uses no CPU) and are loaded in turn by
`ingot bench serve`; prompts differ from one repetition to the next, so that nothing is cached from
an earlier one. llama-server is run with several sets of flags per row; its best median counts.
Prints a Markdown table of medians; --json keeps everything.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name, arguments of `ingot bench serve`, figure, whether more is better, llama-server's flags
ROWS = {
    "single": (
        "1 client, 80-word prompts, 128 tokens out: output tokens/s",
        "--concurrency 1 --requests 3 --prompt-words 80 --output-tokens 128 --ignore-eos",
        ("output_tokens_per_second",),
        True,
        {"-np 1": "-np 1 -c 8192 -fa on", "-np 1 -fa off": "-np 1 -c 8192 -fa off"},
    ),
    "eight": (
        "8 clients, 80-word prompts, 64 tokens out: total tokens/s",
        "--concurrency 8 --requests 8 --prompt-words 80 --output-tokens 64 --ignore-eos",
        ("total_tokens_per_second",),
        True,
        {
            "-np 8": "-np 8 -c 16384 -fa on",
            "-np 8 -fa off": "-np 8 -c 16384 -fa off",
            "-np 8 -kvu": "-np 8 -c 16384 -fa on -kvu",
        },
    ),
    "shared": (
        "8 clients together, 1,000 shared tokens, 32 out: output tokens/s",
        "--concurrency 8 --requests 8 --arrive-together --shared-prefix-tokens 1000"
        " --prompt-words 10 --output-tokens 32 --ignore-eos --warmup 0",
        ("output_tokens_per_second",),
        True,
        {
            "-np 8": "-np 8 -c 16384 -fa off",
            "-np 1": "-np 1 -c 8192 -fa on",
            "-np 1 -fa off": "-np 1 -c 8192 -fa off",
        },
    ),
    "probe": (
        "4 streams while a 4,000-token prompt arrives: p99 inter-token latency, ms",
        "--concurrency 4 --probe-prompt-tokens 4000 --prompt-words 20 --output-tokens 500 --ignore-eos",
        ("during_ms", "p99"),
        False,
        {
            "-b 256": "-np 5 -c 40960 -fa on -b 256 -ub 256",
            "-b 64": "-np 5 -c 40960 -fa on -b 64 -ub 64",
            "-b 64 -fa off": "-np 5 -c 40960 -fa off -b 64 -ub 64",
        },
    ),
}


class Server:
    def __init__(self, name, command, url=None):
        self.name = name
        self.log = tempfile.TemporaryFile()
        out = subprocess.PIPE if url is None else self.log
        self.process = subprocess.Popen(command, stdout=out, stderr=self.log, text=url is None)
        self.url = url or self.find_url()
        self.wait()

    def find_url(self):
        for line in self.process.stdout:
            found = re.search(r"http://[0-9.]+:[0-9]+", line)
            if found:
                return found.group()
        sys.exit(f"{self.name} ended before it listened")

    def wait(self):
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/health") as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        sys.exit(f"{self.name} did not become ready")

    def stop(self):
        self.process.terminate()
        self.process.wait()


def measure(options, server, arguments, seed):
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [options.ingot, "bench", "serve", "--url", server.url, *shlex.split(arguments)]
        command += ["--seed", str(seed), "--json", report.name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{server.name}: {done.stdout}{done.stderr}")
        return json.load(open(report.name))


def value(report, path):
    """The figure at `path` of the report, wherever the median run is kept."""
    node = report["median"] or report["median_probe"]
    for key in path:
        node = node[key]
    return float(node)


def run_row(options, model, row):
    title, arguments, path, more_is_better, variants = ROWS[row]
    ingot = [options.ingot, "serve", model, "--port", "0", "--threads", str(options.threads)]
    ingot += ["--data-dir", options.data_dir, *shlex.split(options.ingot_flags)]
    servers = [Server("ingot", ingot)]
    for index, (name, flags) in enumerate(variants.items()):
        port = options.port + index
        command = [options.llama_server, "-m", model, "-t", str(options.threads)]
        command += ["--host", "127.0.0.1", "--port", str(port), *shlex.split(flags)]
        servers.append(Server(name, command, f"http://127.0.0.1:{port}"))
    figures = {server.name: [] for server in servers}
    for repetition in range(options.repeat):
        turn = servers if repetition % 2 == 0 else servers[::-1]
        for server in turn:
            report = measure(options, server, arguments, options.seed + repetition)
            figures[server.name].append(value(report, path))
            print(f"{row} {repetition} {server.name}: {figures[server.name][-1]:.2f}", flush=True)
    for server in servers:
        server.stop()
    medians = {name: statistics.median(values) for name, values in figures.items()}
    ours = medians.pop("ingot")
    best = (max if more_is_better else min)(medians, key=medians.get)
    return {
        "model": Path(model).name,
        "row": row,
        "title": title,
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
    results = [run_row(options, model, row) for model in options.model for row in options.rows]
    if options.json:
        json.dump(results, open(options.json, "w"), indent=1)
    print("\n| model | work | ingot | llama-server (best flags) | ratio |\n|---|---|---|---|---|")
    for result in results:
        theirs = result["llama_server"][result["best"]]
        print(
            f"| {result['model']} | {result['title']} | {result['ingot']:.1f} "
            f"| {theirs:.1f} (`{result['best']}`) | {result['ratio']:.2f}× |"
        )


if __name__ == "__main__":
    main()
