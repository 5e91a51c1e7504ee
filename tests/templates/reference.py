"""Render chat templates the way transformers' `apply_chat_template` does, as the oracle for `check.rs`.

Usage: python reference.py TEMPLATES_DIR OUTPUT.json [EXTRA_DIR ...]

Needs only jinja2. Reads `conversations.json` beside this file; both sides fix the clock, the special
tokens and the parsing of tool-call arguments, so that any difference is a difference of rendering.
The environment is `transformers.utils.chat_template_utils._compile_jinja_template`, copied in meaning.
Output: {"<template>": {"<conversation>": {"ok": text} | {"error": class, "message": text}}}.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = pathlib.Path(__file__).parent


class GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training masks; it prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

    def _body(self, caller):
        return caller()


def environment(now):
    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, jinja2.ext.loopcontrols],
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: now.strftime(format)
    return env


def parse_arguments(messages):
    """Tool-call arguments arrive as JSON text; templates expect the object."""
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for call in message.get("tool_calls") or []:
            function = call.get("function") or {}
            if isinstance(function.get("arguments"), str):
                try:
                    parsed = json.loads(function["arguments"])
                except ValueError:
                    continue
                if isinstance(parsed, dict):
                    function["arguments"] = parsed
    return messages


def render(env, template, conversation, bos, eos):
    arguments = dict(
        messages=parse_arguments(conversation["messages"]),
        tools=conversation.get("tools"),
        documents=None,
        add_generation_prompt=conversation.get("add_generation_prompt", True),
        bos_token=bos,
        eos_token=eos,
    )
    arguments.update(conversation.get("kwargs", {}))
    return template.render(**arguments)


def main():
    folders, output = [sys.argv[1], *sys.argv[3:]], sys.argv[2]
    spec = json.loads((HERE / "conversations.json").read_text())
    now = datetime.datetime.fromtimestamp(spec["now"], datetime.timezone.utc)
    env = environment(now)
    result = {}
    for path in sorted(p for folder in folders for p in pathlib.Path(folder).glob("*.jinja")):
        # llama.cpp's and transformers' loaders read the text as it is.
        source = path.read_text(encoding="utf-8")
        rows = result[path.name] = {}
        try:
            template = env.from_string(source)
        except Exception as error:
            rows["*"] = {"error": type(error).__name__, "message": str(error)}
            continue
        for conversation in spec["conversations"]:
            try:
                row = {"ok": render(env, template, conversation, spec["bos"], spec["eos"])}
            except Exception as error:
                row = {"error": type(error).__name__, "message": str(error)}
            rows[conversation["name"]] = row
    pathlib.Path(output).write_text(json.dumps(result, ensure_ascii=False, indent=1))
    rows = [row for template in result.values() for row in template.values()]
    print(f"{len(result)} templates, {len(rows)} rows, {sum('ok' in row for row in rows)} rendered")


if __name__ == "__main__":
    main()
