"""A server for the tests: the one that INGOT_URL names, or one started from INGOT_BIN."""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request

START_SECONDS = 120


def find_or_start():
    """The base URL, a model's name and the API key (or None) of a server that is ready."""
    url, key = os.environ.get("INGOT_URL"), os.environ.get("INGOT_API_KEY")
    process = None
    if not url:
        key = "sk-end-to-end"
        url, process = start(key)
    url = url.rstrip("/")
    return url, os.environ.get("INGOT_MODEL") or first_model(url, key, process), key


def start(key, data=None, *more):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ["INGOT_BIN"], "serve", os.environ.get("INGOT_TEST_MODEL", "smollm2:135m")]
    command += ["--port", str(port), "--api-key", key, *more]
    if data := data or os.environ.get("INGOT_TEST_DATA"):
        command += ["--data-dir", data]
    process = subprocess.Popen(command)
    atexit.register(stop, process)
    return f"http://127.0.0.1:{port}", process


def stop(process):
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()


def first_model(url, key, process):
    """Waits until the server is ready."""
    request = urllib.request.Request(url + "/v1/models", headers={"Authorization": f"Bearer {key}"})
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(url + "/ready", timeout=5).close()
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)["data"][0]["id"]
        except (OSError, urllib.error.URLError, IndexError):
            time.sleep(0.1)
    raise SystemExit("the server is not ready")


def run(names, finish=lambda: None, default=None):
    """Runs the functions `test_*` of a module's `globals()`: those that the command line names, else those
    of the list `default`, else all. Calls `finish`, and exits: 1 if a test failed or none was chosen."""
    tests = {name: test for name, test in names.items() if name.startswith("test_")}
    wanted = sys.argv[1:] or default or list(tests)
    chosen = [name for name in tests if name in wanted]
    failed = 0
    for name in chosen:
        started = time.monotonic()
        try:
            tests[name]()
            print(f"ok     {name} ({time.monotonic() - started:.2f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED {name}", flush=True)
            traceback.print_exc()
    finish()
    print(f"{len(chosen) - failed} passed, {failed} failed")
    sys.exit(1 if failed or not chosen else 0)
