"""Runs what README shows: its Python code, its request with curl, and the script of the lifecycle example,
against a server of its own.

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


if __name__ == "__main__":
    _server.run(globals())
