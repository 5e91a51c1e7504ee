"""Reads the cases of llama.cpp's own test of chat templates.

    python llama_cases.py TEST_CHAT_TEMPLATE.CPP OUT.json

Writes a list of {name, template, bos, eos, messages, expected}: what llama.cpp's Jinja engine has to
render, always with a generation prompt.
"""

import json
import re
import sys

CONVERSATION = r"std::vector<llama_chat_message> conversation \{(.*?)\n    \};"
CASES = r"std::vector<TestCase> test_cases \{\n(.*?)\n    \};"
# A raw literal, an ordinary one, or whatever may stand between them.
TOKEN = re.compile(r'(?:u8)?R"\((.*?)\)"|(?:u8)?"((?:\\.|[^"\\])*)"|//[^\n]*|/\*\s*\.(\w+)=?\s*\*/|([{}])|(\w+)', re.S)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "'": "'", "0": "\0"}


def unescape(text):
    text = re.sub(
        r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)",
        lambda found: ESCAPES.get(found[1]) or chr(int(found[1][1:], 16)),
        text,
        flags=re.S,
    )
    # \xNN are bytes of UTF-8.
    if re.search("[\x80-\xff]", text):
        try:
            return text.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return text
    return text


def pairs(text):
    """The messages of `{{"role", "content"}, …}`."""
    literals = [raw or unescape(plain) for raw, plain, *_ in TOKEN.findall(text) if raw or plain]
    return [{"role": a, "content": b} for a, b in zip(literals[::2], literals[1::2], strict=True)]


def cases(text):
    """Each case as a dictionary of its fields; texts are joined, nested lists are their source."""
    depth, case, field, start = 0, {}, None, 0
    for token in TOKEN.finditer(text):
        raw, plain, name, brace, word = token.groups()
        if brace == "{":
            depth += 1
            if depth == 2:
                start = token.start()
        elif brace == "}":
            depth -= 1
            if depth == 1:
                case[field] = text[start : token.end()]
            if depth == 0:
                yield case
                case = {}
        elif depth != 1:
            continue
        elif name:
            field = name
            case.setdefault(field, "")
        elif word in ("true", "false"):
            case[field] = word
        elif raw is not None or plain is not None:
            case[field] += raw if raw is not None else unescape(plain)


def main(source, out):
    with open(source, encoding="utf-8") as file:
        text = file.read()
    messages = pairs(re.search(CONVERSATION, text, re.S)[1])
    found = [
        {
            "name": case["name"],
            "template": case["template_str"],
            "bos": case.get("bos_token", ""),
            "eos": case.get("eos_token", ""),
            "messages": messages + pairs(case.get("extra_conversation", "")),
            "expected": case.get("expected_output_jinja") or case["expected_output"],
        }
        for case in cases(re.search(CASES, text, re.S)[1])
        if case.get("supported_with_jinja") != "false"
    ]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file, ensure_ascii=False, indent=1)
    assert len(found) >= 30, f"{len(found)} cases"


if __name__ == "__main__":
    main(*sys.argv[1:])
