#!/usr/bin/env python3
"""The native runner's kernels against others' on this machine: same model file, two threads, in turn.

    scripts/bench_kernels.py --llama BIN --model FILE [--model random:Q4_K_M …] [--repeat 5]
        [--rows …] [--ik BIN] [--mistralrs-python PYTHON]

Native and the llama_cpp runner run in one process (`cargo bench --bench runners`), llama-bench and
llama-batched-bench of llama.cpp and of ik_llama.cpp (their folders of binaries) and mistral.rs (a
Python that has it) beside them, a repetition of each in turn, row by row. Every peer has several sets
of flags; its best median counts. What the first repetition shows to be out of the race (below 0.8 of
the same peer's best, or a quarter of native) is not run again. `random:` and a preset is a model with
random weights and the dimensions of Llama-3.2-1B, kept in .cache/bench. Prints a Markdown table of
medians in tokens/s; --json keeps everything. Servers are `bench_peers.py`'s.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THREADS = 2  # benches/runners has as many.
BENCH, BATCHED = "llama-bench", "llama-batched-bench"


@dataclass(frozen=True)
class Row:
    # Its name in benches/runners.
    work: str
    # What measures it outside, with which arguments.
    tool: str = ""
    llama: str = ""
    ik: str = ""
    mistralrs: str = ""
    # Of native, flash and plain; the last two are llama.cpp, whose own tools measure it too.
    sides: str = "native,flash,plain"
    # Times in one process, of which it reports the median.
    times: int = 1


def batched(work, arguments, mistralrs=""):
    return Row(work, BATCHED, arguments, arguments, mistralrs)


ROWS = {
    "prefill": Row("prefill 512", BENCH, "-p 512 -n 0", "-p 512 -n 0", "prefill"),
    "decode": Row("decode, 1 stream, 64 to 128", BENCH, "-p 0 -n 64 -d 64", "-p 0 -n 0 -gp 64,64", "decode"),
    "deep": Row(
        "decode, 1 stream, at 4,000", BENCH, "-p 0 -n 24 -d 4000", "-p 0 -n 0 -gp 4000,24", sides="native"
    ),
    "eight": batched("decode, 8 streams", "-npp 64 -ntg 32 -npl 8 -c 2048", "eight"),
    "many": batched("decode, 32 streams", "-npp 64 -ntg 12 -npl 32 -c 8192"),
    "shared": batched("decode, 8 streams that share 1,000", "-npp 1000 -ntg 16 -npl 8 -pps -c 16384"),
    # What is first in a process waits for the system to find huge pages, for whom it may be.
    "load": Row("loads and first tokens, a minute", times=3),
}

LLAMA, IK, MISTRALRS = PEERS = ("llama.cpp", "ik_llama.cpp", "mistral.rs")
# Flags by tool. Run-time repacking of ik_llama.cpp brings its interleaved layouts.
VARIANTS = {
    LLAMA: {
        BENCH: ("-fa on", "-fa off"),
        BATCHED: ("-fa on", "-fa off"),
    },
    IK: {
        BENCH: ("-fa 1", "-fa 0", "-fa 1 -rtr 1", "-fa 0 -rtr 1"),
        BATCHED: ("-fa on", "-fa off", "-fa on -rtr", "-fa off -rtr"),
    },
}
SIDES = {"flash": "runner, flash", "plain": "runner"}


def output(command, **more):
    """What a command prints, or None, with its last words on our standard error."""
    done = subprocess.run(
        command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
    )
    if done.returncode == 0:
        return done.stdout
    print(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-1000:]}", file=sys.stderr)
    return None


def in_process(runners, model, row):
    """Rates of native and of the llama_cpp runner, and what the process says besides."""
    command = [runners, model, "--repeat", str(row.times), "--works", row.work, "--sides", row.sides]
    text = output(command)
    if text is None:
        sys.exit("the runners do not run")
    cells = re.search(rf"^\| {re.escape(row.work)} \|(.*)", text, re.MULTILINE).group(1).split("|")
    rates = dict(zip(row.sides.split(","), map(float, cells)))
    figures = {("native", ""): rates.pop("native")}
    figures |= {(LLAMA, SIDES[side]): rate for side, rate in rates.items()}
    memory = re.search(r"gives them ([\d.]+) times a second", text)
    figures["memory", ""] = float(memory.group(1))
    return figures


def tool(peer, folder, flags, model, row):
    """The rate that llama-bench or llama-batched-bench reports."""
    command = [str(Path(folder).resolve() / row.tool), "-m", model, "-t", str(THREADS), *flags.split()]
    command += (row.llama if peer == LLAMA else row.ik).split()
    # Some leave a log where they run.
    with tempfile.TemporaryDirectory() as here:
        text = output(command + (["-r", "1", "-o", "json"] if row.tool == BENCH else []), cwd=here)
    if row.tool == BENCH:
        rate = text and float(re.search(r'"avg_ts": ([\d.]+)', text).group(1))
    else:
        # Columns: PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG, T, S.
        found = text and re.search(r"^\|" + r" *[\d.]+ \|" * 7 + r" *([\d.]+) \|", text, re.MULTILINE)
        rate = found and float(found.group(1))
    return {(peer, flags): rate} if rate else {}


def mistralrs(python, model, row):
    command = [python, str(ROOT / "scripts/bench_mistralrs.py"), model, row.mistralrs]
    text = output(command, env={**os.environ, "RAYON_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
    found = text and re.search(r"^\{.*\}$", text, re.MULTILINE)
    return {(MISTRALRS, ""): json.loads(found.group())[row.mistralrs]} if found else {}


def contenders(options, model, row):
    """Who runs: what it measures (None: always needed), and a function that answers figures."""
    yield None, partial(in_process, options.runners, model, row)
    for peer, folder in ((LLAMA, options.llama), (IK, options.ik)):
        for flags in VARIANTS[peer][row.tool] if folder and row.tool else ():
            yield (peer, flags), partial(tool, peer, folder, flags, model, row)
    if options.mistralrs_python and row.mistralrs:
        yield (MISTRALRS, ""), partial(mistralrs, options.mistralrs_python, model, row)


def in_the_race(key, figures):
    if key is None:
        return True
    if key not in figures:
        return False
    best = max(rates[0] for (group, _), rates in figures.items() if group == key[0])
    return figures[key][0] >= max(0.8 * best, 0.25 * figures["native", ""][0])


def run_row(options, model, name):
    row = ROWS[name]
    turn = list(contenders(options, model, row))
    figures = defaultdict(list)
    for repetition in range(options.repeat):
        for _, measure in turn if repetition % 2 == 0 else turn[::-1]:
            for key, figure in measure().items():
                figures[key].append(figure)
                print(f"{Path(model).name} {name} {repetition} {' '.join(key)}: {figure:.2f}", flush=True)
        turn = [(key, measure) for key, measure in turn if in_the_race(key, figures)]
    return figures


def best(figures, peer):
    """The best median of a peer, what it is of, and how often that was run."""
    medians = {
        flags: (statistics.median(rates), len(rates))
        for (group, flags), rates in figures.items()
        if group == peer
    }
    if not medians:
        return None
    flags = max(medians, key=lambda flags: medians[flags][0])
    return flags, *medians[flags]


def cells(figures, repeat, share=None):
    """The table's cells of a row; with a share, of that figure."""
    ours = statistics.median(figures["native", ""])
    yield f"{ours:.1f}" if share is None else f"{ours / share:.0%}"
    for peer in PEERS:
        found = best(figures, peer)
        if found is None:
            yield from ("", "")
        elif share is not None:
            yield from (f"{found[1] / share:.0%}", "")
        else:
            flags, rate, runs = found
            about = ", ".join(([f"`{flags}`"] if flags else []) + ([] if runs == repeat else [f"{runs} run"]))
            yield from (f"{rate:.1f}" + (f" ({about})" if about else ""), f"{ours / rate:.2f}×")


def table(results, repeat):
    heads = ["model", "work", "native"] + [cell for peer in PEERS for cell in (peer, "ratio")]
    lines = [heads, ["---"] * len(heads)]
    for model, rows in results.items():
        for name, figures in rows.items():
            lines.append([model, ROWS[name].work, *cells(figures, repeat)])
            if name == "decode":
                memory = statistics.median(figures["memory", ""])
                lines.append([model, "the same, of what memory allows", *cells(figures, repeat, memory)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def find_runners():
    """Builds benches/runners and says where it is."""
    text = output(["cargo", "bench", "--bench", "runners", "--no-run"], cwd=ROOT)
    found = text and re.search(r"benches/runners/main\.rs \((.*)\)", text)
    return str(ROOT / found.group(1)) if found else sys.exit("benches/runners does not build")


def find_model(options, model):
    """The file of a model, in the page cache; a random one is made unless it is there."""
    if model.startswith("random:"):
        path = Path(options.folder) / f"1B-{model[7:]}.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            if output([options.runners, model, "--write", str(part)]) is None:
                sys.exit(f"{model} cannot be made")
            part.rename(path)
        model = path
    with open(model, "rb") as file:
        while file.read(1 << 24):
            pass
    return str(Path(model).resolve())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", help="folder with llama.cpp's llama-bench and llama-batched-bench")
    parser.add_argument("--ik", help="the same of ik_llama.cpp")
    parser.add_argument("--mistralrs-python", help="a Python that has mistral.rs")
    parser.add_argument("--runners", help="binary of benches/runners (default: cargo builds it)")
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--folder", default=str(ROOT / ".cache/bench"), help="of random models")
    parser.add_argument("--json")
    options = parser.parse_args()
    options.runners = options.runners or find_runners()
    results = defaultdict(dict)
    for model in options.model:
        path = find_model(options, model)
        for name in options.rows:
            results[Path(path).stem][name] = run_row(options, path, name)
            if options.json:
                keep(options.json, results)
    print("\n" + table(results, options.repeat))


def keep(path, results):
    flat = [
        {"model": model, "row": name, "of": group, "flags": flags, "figures": figures}
        for model, rows in results.items()
        for name, row in rows.items()
        for (group, flags), figures in row.items()
    ]
    Path(path).write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
