#!/usr/bin/env python3
"""Asks a running server one chat question, or prints the curl line that does.

usage: ask.py URL [--curl] [--timeout SECONDS]

Waits until the server is ready. Needs nothing but Python's own library.
"""

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request

QUESTION = "What is the capital of France? Answer in one short sentence."


def call(url, body=None):
    headers = {"content-type": "application/json"}
    key = os.environ.get("INGOT_API_KEY", "").split(",")[0]
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    # A proxy of the environment must not stand between us and this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data, headers), timeout=120) as answer:
        return answer.read()


def wait_ready(url, timeout):
    end = time.monotonic() + timeout
    while True:
        try:
            call(f"{url}/ready")
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end:
                sys.exit(f"The server at {url} was not ready within {timeout} s: {error}")
            time.sleep(0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--curl", action="store_true", help="print a curl line, ask nothing")
    parser.add_argument("--timeout", type=float, default=600)
    options = parser.parse_args()
    url = options.url.rstrip("/")
    wait_ready(url, options.timeout)
    try:
        model = json.loads(call(f"{url}/v1/models"))["data"][0]["id"]
    except (urllib.error.URLError, LookupError):
        model = "MODEL"
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}]}
    if options.curl:
        auth = " -H 'authorization: Bearer KEY'" if os.environ.get("INGOT_API_KEY") else ""
        print(f"\nServing at {url}. Try:\n")
        print(f"curl {url}/v1/chat/completions{auth} -H 'content-type: application/json' \\")
        print(f"    -d '{json.dumps(body)}'\n", flush=True)
        return
    answer = json.loads(call(f"{url}/v1/chat/completions", {**body, "temperature": 0, "max_tokens": 64}))
    text = answer["choices"][0]["message"]["content"]
    if not text or not text.strip():
        sys.exit(f"The answer is empty: {answer}")
    print(f"question: {QUESTION}\nanswer:   {text.strip()}")


if __name__ == "__main__":
    main()
