"""Runs what README shows: its Python code, its request with curl, and the scripts of the lifecycle, compression
and shipping examples, against a server of its own.

    INGOT_BIN=target/release/ingot python tests/e2e/test_readme.py [NAME…]

The server serves smollm2:135m from the data folder INGOT_TEST_DATA. What the code prints is printed.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import _server
from _browser import check_report

if "INGOT_RUNNER" in os.environ:
    print("tested with the native runner only")
    sys.exit()
ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# README calls the model by its alias.
os.environ.pop("INGOT_TEST_MODEL", None)
os.chdir(ROOT)
ADMIN = "sk-readme-admin"


def start():
    # Jobs go to a folder of their own, with what the other has: models as links, the rest as copies.
    data = tempfile.mkdtemp(prefix="ingot-readme-")
    shutil.copytree(
        os.environ["INGOT_TEST_DATA"],
        data,
        copy_function=lambda a, b: (os.link if a.endswith(".gguf") else shutil.copy2)(a, b),
        ignore=shutil.ignore_patterns("jobs", "adapters", "files"),
        dirs_exist_ok=True,
    )
    key = "sk-readme"
    url, process = _server.start(key, data, "--admin-key", ADMIN, "--log-level", "warn")
    assert _server.first_model(url, key, process) == "smollm2:135m"
    return url, key


URL, KEY = start()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def here(code):
    """README's code, for this server."""
    code = code.replace("http://127.0.0.1:8000", URL).replace('api_key="none"', f'api_key="{KEY}"')
    assert URL in code or "OpenAI(" not in code
    return code


def test_python():
    chat, tune = blocks("python")
    variables, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(here(chat), variables)
    # A sampled answer, so only its presence can be asserted.
    assert out.getvalue().strip(), out.getvalue()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(here(tune), variables)
    print(out.getvalue(), flush=True)
    job = variables["job"]
    assert job.status == "succeeded", job
    base, tuned = out.getvalue().strip().split("\n")[-2:]
    assert base.startswith("smollm2:135m: ") and tuned.startswith(f"{job.fine_tuned_model}: ")
    # The example's voice ends its posts so.
    assert "Tide's in" in tuned and "Tide's in" not in base, (base, tuned)


def test_curl():
    (command,) = [block for block in blocks("sh") if block.startswith("curl")]
    command = here(command).replace("-H 'Content", f"-H 'Authorization: Bearer {KEY}' -H 'Content", 1)
    answer = subprocess.run(["sh", "-c", command], check=True, capture_output=True).stdout
    # A sampled answer of a small model: what it says cannot be asserted.
    body = json.loads(answer)
    (choice,) = body["choices"]
    assert body["model"] == "smollm2:135m" and choice["message"]["content"], body
    assert choice["finish_reason"] in ("stop", "length") and body["usage"]["completion_tokens"] > 0, body


def test_lifecycle():
    script = ROOT / "configs/examples/lifecycle/run.sh"
    names = {"INGOT": str(pathlib.Path(os.environ["INGOT_BIN"]).resolve()), "INGOT_URL": URL}
    env = {**os.environ, **names, "INGOT_ADMIN_KEY": ADMIN, "STEPS": "1"}
    run = subprocess.run([script], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    # What the sampled answers say cannot be asserted.
    for heading in (r"^Before:$", r"^After supervised fine-tuning \(ft:.*voice.*\):$", r"^After GRPO \(ft:.*policy.*taste.*:$"):
        assert re.search(heading, run.stdout, re.MULTILINE), run.stdout
    assert not list(script.parent.glob(".filled*")), "a file is left"


def test_compression():
    script = ROOT / "configs/examples/compress/run.sh"
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "INGOT": str(pathlib.Path(os.environ["INGOT_BIN"]).resolve()), "CHUNKS": "2"}
        if data := os.environ.get("INGOT_TEST_DATA"):
            env["INGOT_DATA_DIR"] = data
        run = subprocess.run([script, "smollm2:135m", folder], env=env, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        report = json.loads(pathlib.Path(folder, "evaluation.json").read_text())
        q8, iq4 = report["models"]
        assert q8["quantization"] == "Q8_0" and iq4["quantization"] == "IQ4_NL", report
        kl = [model["divergence"]["mean_kl"]["value"] for model in (q8, iq4)]
        # The weights are those of a Q4_1 file: another four bits cost more than eight.
        assert 0 < kl[0] < 0.01 < kl[1] < 0.5, kl
        assert all(1 < model["perplexity"]["value"] < 1000 for model in (q8, iq4)), report
        assert all(gate["passed"] for gate in report["gates"]) and len(report["gates"]) == 2, report
        page = pathlib.Path(folder, "evaluation.html").read_text()
        check_report(page, "Evaluation", "bits per byte", "same top token", "IQ4_NL.gguf")
        # A gate that is missed is a failure.
        command = [env["INGOT"], "eval", "IQ4_NL.gguf", "--reference", "reference.gguf"]
        command += ["--data", str(ROOT / "README.md"), "--max-kl", "1e-6", "--json", "gate.json"]
        failed = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
        assert failed.returncode == 1 and "FAIL" in failed.stdout, (failed.stdout, failed.stderr)
        assert not json.loads(pathlib.Path(folder, "gate.json").read_text())["gates"][0]["passed"]


def test_shipping():
    script = ROOT / "configs/examples/ship/run.sh"
    names = {"INGOT": str(pathlib.Path(os.environ["INGOT_BIN"]).resolve()), "INGOT_URL": URL}
    env = {**os.environ, **names, "INGOT_ADMIN_KEY": ADMIN, "CHUNKS": "2"}
    run = subprocess.run([script], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    # Published, a share, all, and back.
    rows = [line.split() for line in run.stdout.splitlines() if line.startswith("assistant ")]
    big, small = "smollm2:135m", "smollm2:135m-IQ4_NL"
    assert rows == [
        ["assistant", big, "-", "-", "-"],
        ["assistant", big, small, "5.00%", "-"],
        ["assistant", small, "-", "-", big],
        ["assistant", big, "-", "-", small],
    ], run.stdout
    assert "Paris" in run.stdout, run.stdout
    # A gate that is missed stops the script before anything is published.
    env.update(NAME="other", TYPE="Q4_0", MAX_KL="1e-6")
    failed = subprocess.run([script], env=env, capture_output=True, text=True, timeout=600)
    assert failed.returncode == 1 and "Bounds are missed" in failed.stderr, failed.stderr
    assert "Q4_0" not in failed.stdout.split("other", 1)[1].splitlines()[0], failed.stdout


if __name__ == "__main__":
    _server.run(globals())
