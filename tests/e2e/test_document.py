"""Tests that the OpenAPI document and the server say the same.

    INGOT_BIN=target/release/ingot python tests/e2e/test_document.py [NAME…]

A server with the mock runner is started from INGOT_BIN. The document is the one that it serves;
INGOT_TEST_DOCUMENT is the path of another one, to be tested before a build serves it. Names choose
tests. INGOT_TEST_EXAMPLES is how many requests of each operation schemathesis makes up at random
(default 40), beside those that it derives from the document.

Needs the PyPI packages schemathesis and jsonschema.
"""

import contextlib
import copy
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
import uuid

# hypothesis, which schemathesis is made of, would keep its notes in the working folder.
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp(prefix="hypothesis-")

import schemathesis
from jsonschema import Draft202012Validator
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

import _openai_types
import _server

MODEL = "mock"
ADMIN = "sk-admin"
EXAMPLES = int(os.environ.get("INGOT_TEST_EXAMPLES", "40"))
SEED = 20250101
# What the mock model is: its vectors' size, and the largest id of a token that is a byte.
VECTOR, LAST_BYTE = 8, 255


def start():
    # The server's own variables must not change what is tested.
    for name in [name for name in os.environ if name.startswith("INGOT_")]:
        if not name.startswith(("INGOT_TEST_", "INGOT_BIN")):
            del os.environ[name]
    os.environ["INGOT_TEST_MODEL"] = MODEL
    data = tempfile.mkdtemp(prefix="ingot-document-")
    more = ["--runner", "mock", "--admin-key", ADMIN, "--log-level", "warn"]
    url, process = _server.start("sk-end-to-end", data, *more)
    _server.first_model(url, "sk-end-to-end", process)
    return url


def request(method, path, body=None, *, form=None, key=ADMIN):
    """Status, content type and body (JSON where it is JSON) of an answer."""
    headers, data = {"Authorization": f"Bearer {key}"}, None
    if form is not None:
        boundary = uuid.uuid4().hex
        headers["Content-Type"] = f"multipart/form-data; boundary={boundary}"
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
            + ('; filename="data.jsonl"' if name == "file" else "")
            + f"\r\n\r\n{value}\r\n"
            for name, value in form.items()
        ]
        data = ("".join(parts) + f"--{boundary}--\r\n").encode()
    elif body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    asked = urllib.request.Request(URL + path, data=data, headers=headers, method=method)
    try:
        answer = urllib.request.urlopen(asked, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        kind, text = answer.headers.get_content_type(), answer.read()
        return (
            answer.status,
            kind,
            json.loads(text) if kind == "application/json" else text.decode(),
        )


if "INGOT_RUNNER" in os.environ:
    print("tested with the mock runner only")
    sys.exit()
URL = start()
if path := os.environ.get("INGOT_TEST_DOCUMENT"):
    with open(path, encoding="utf-8") as file:
        DOCUMENT = json.load(file)
else:
    DOCUMENT = request("GET", "/openapi.json")[2]
SCHEMAS = DOCUMENT["components"]["schemas"]

# The schemas of a job's specification.
SPECS = [
    "JobSpec",
    "TrainingSpec",
    "QuantizeSpec",
    "QuantizeSettings",
    "QuantizeRequest",
    "EvaluateSpec",
]


def lenient():
    """The document as the server reads it, where the document leaves out what nobody should send.

    Unknown keys that say nothing are accepted: graders take null, the specification of a job takes
    none, all others also take empty texts, lists and objects.
    """
    document = copy.deepcopy(DOCUMENT)
    nothing = {
        "anyOf": [
            {"enum": [None, "", []]},
            {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/Nothing"}},
        ]
    }

    def open_up(node, unknown):
        if isinstance(node, list):
            for inner in node:
                open_up(inner, unknown)
        if not isinstance(node, dict):
            return
        for inner in node.values():
            open_up(inner, unknown)
        if node.pop("x-neutral", None):
            anyway = {"description": node.pop("description", "")}
            alternatives = [dict(node), {"$ref": "#/components/schemas/Nothing"}]
            node.clear()
            node.update(anyway, anyOf=alternatives)
        elif node.get("additionalProperties") is False:
            node["additionalProperties"] = unknown

    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        if name not in SPECS:
            null = "Grader" in name and "Request" not in name
            unknown = {"type": "null"} if null else {"$ref": "#/components/schemas/Nothing"}
            open_up(schema, unknown)
    schemas["Nothing"] = nothing
    return document


def validator(document, schema):
    return Draft202012Validator({**schema, "components": document["components"]})


def reference(name):
    return {"$ref": f"#/components/schemas/{name}"}


LENIENT = lenient()


# -------------------------------------------------------------------------------------------------
# Requests that schemathesis makes up

CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
]
# Requests that are right in form are refused here, for what they name is not there.
NEVER_ACCEPTED = {
    "createScore": "the mock model is no reward model",
    "createFineTuningJob": "the mock model cannot be trained",
    "adminCreateJob": "the mock model has no file, and there are no files",
    "adminQuantizeModel": "the mock model has no file",
    "adminPublish": "a share is one of a published name, and there is none",
    "adminLoadAdapter": "an upload that is made up is no adapter",
}


def narrowed():
    """The document for the mock model: what the document leaves to the model is decided.

    Bounds are also smaller here, so that requests are small and none takes long. A request that is
    outside of these but inside of the document's is no bad one: see is_pardoned.
    """
    document = copy.deepcopy(DOCUMENT)
    schemas = document["components"]["schemas"]

    def smaller(node):
        for inner in (
            node if isinstance(node, list) else node.values() if isinstance(node, dict) else []
        ):
            smaller(inner)
        if isinstance(node, dict):
            for key, most in [("maxItems", 3), ("maxProperties", 3), ("maxLength", 32)]:
                if isinstance(node.get(key), int):
                    node[key] = min(node[key], most)

    for name, schema in schemas.items():
        if name not in ("CreateFileRequest", "UploadAdapterRequest"):
            smaller(schema)

    def tokens(node):
        for inner in (
            node if isinstance(node, list) else node.values() if isinstance(node, dict) else []
        ):
            tokens(inner)
        if isinstance(node, dict) and node.get("maximum") == 2**31 - 1 and node.get("minimum") == 0:
            node["maximum"] = LAST_BYTE

    for name in [
        "ChatCompletionRequest",
        "CompletionRequest",
        "EmbeddingRequest",
        "DetokenizeRequest",
    ]:
        tokens(schemas[name])
    for name in ["ChatCompletionRequest", "CompletionRequest"]:
        properties = schemas[name]["properties"]
        properties["model"] = {"const": MODEL}
        properties["n"]["maximum"] = 3
        for key in ["max_tokens", "max_completion_tokens"]:
            properties[key]["maximum"] = 8
        properties["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]{1,2}$"}
    schemas["ChatCompletionRequest"]["properties"]["reasoning_effort"] = {"enum": ["medium", None]}
    schemas["CompletionRequest"]["properties"]["suffix"] = {"enum": ["", None]}
    embedding = schemas["EmbeddingRequest"]["properties"]
    embedding["model"] = {"const": MODEL}
    embedding["dimensions"] = {"enum": [VECTOR, None]}
    for name in ["TokenizeRequest", "DetokenizeRequest", "ApplyTemplateRequest"]:
        for form in schemas[name].get("anyOf", [schemas[name]]):
            form["properties"]["model"] = {"enum": [MODEL, None]}
    # Every kind of grader is tried where graders are validated; once is enough.
    for name in ["RunGraderRequest", "FineTuningMethod", "TrainingSpec", "EvaluateSpec"]:
        text = json.dumps(schemas[name])
        one = text.replace('schemas/Grader"', 'schemas/StringCheckGrader"')
        assert one != text, f"{name} has no grader"
        schemas[name] = json.loads(one)
    # Other parts are skipped, but their made-up names are no valid headers.
    schemas["CreateFileRequest"]["additionalProperties"] = False
    return document


def whole(value):
    """A body without integers such as 1.0: JSON schema has them for some, the server not."""
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def settle(body):
    """Makes a request that is right by the document keep the rules that it tells in words only."""
    if "grader" in body:
        settle_grader(body["grader"])
    if body.get("prompt") is not None and "model" in body and body.get("max_tokens") == 0:
        body["max_tokens"] = 1
    if body.get("do_sample") is False:
        body.pop("temperature", None)
    if not body.get("stream"):
        body.pop("stream_options", None)
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    if body.get("max_tokens") is not None:
        body.pop("max_completion_tokens", None)
    elif body.get("max_completion_tokens") == 0:
        body["max_completion_tokens"] = 1
    last = (body.get("messages") or [None])[-1]
    if isinstance(last, dict) and last.get("tool_calls"):
        # Tool calls end a turn: there is nothing to continue.
        body.pop("continue_final_message", None)
    if body.get("continue_final_message"):
        body.pop("add_generation_prompt", None)
    if isinstance(body.get("enable_thinking"), bool):
        body.pop("chat_template_kwargs", None)
    body.pop("best_of", None)
    body.pop("reward_model", None)
    form = body.get("response_format")
    if isinstance(form, dict):
        plain = {"type": "object", "properties": {"a": {"type": "boolean"}}}
        for at in [form, form.get("json_schema")]:
            if isinstance(at, dict) and isinstance(at.get("schema"), dict):
                at["schema"] = plain
        for key, value in [("regex", "[ab]+"), ("grammar", 'start: "a"')]:
            if key in form:
                form[key] = value
    tools = body.get("tools") or []
    for index, tool in enumerate(tools):
        tool["function"]["parameters"] = {"type": "object"}
        tool["function"]["name"] = f"f{index}"
    if not tools:
        body.pop("tool_choice", None)
    elif isinstance(body.get("tool_choice"), dict):
        body["tool_choice"]["function"]["name"] = "f0"


def settle_grader(grader):
    kind = grader.get("type")
    if kind == "multi":
        graders = grader["graders"]
        if isinstance(graders, list):
            for index, inner in enumerate(graders):
                inner["name"] = f"g{index}"
                settle_grader(inner)
            grader["calculate_output"] = "g0"
        elif isinstance(graders.get("type"), str):
            graders["name"] = "g0"
            settle_grader(graders)
            grader["calculate_output"] = "g0"
        else:
            for inner in graders.values():
                settle_grader(inner)
            grader["calculate_output"] = next(iter(graders))
    elif kind == "regex":
        grader["pattern"] = "a+"
    elif kind == "json_schema":
        grader["schema"] = {"type": "object"}
    elif kind == "score_model" and grader.get("range") is not None:
        grader["range"] = [0, 1]
    elif kind == "length" and grader.get("min") is not None:
        grader.pop("max", None)


def is_form(case):
    return case.media_type == "multipart/form-data"


@schemathesis.hook
def before_call(_context, case, _kwargs):
    """Settles a request: one that is to be refused should be for what is wrong with it alone."""
    operation = case.operation.definition.raw["operationId"]
    if operation == "adminUnloadModel" and case.path_parameters.get("name") == MODEL:
        # schemathesis tries names that it has seen. The model is needed.
        case.path_parameters["name"] = "none"
    if case.meta.generation.mode.is_positive and isinstance(case.query, dict):
        # It must be the id of an entry.
        case.query.pop("after", None)
    if is_form(case) or not isinstance(case.body, dict):
        return
    case.body = whole(case.body)
    # What is to be refused may have any form. See is_pardoned, if settling it made it right.
    with contextlib.suppress(AttributeError, IndexError, KeyError, StopIteration, TypeError):
        settle(case.body)
    # Without a bound the mock model may write thousands of tokens.
    if operation == "createChatCompletion" and case.body.get("max_completion_tokens") is None:
        case.body["max_tokens"] = case.body.get("max_tokens") or 8


def is_pardoned(case):
    """Whether a request that was made up to be refused is right after all.

    Then it is only outside of what is narrowed, or what is wrong with it says nothing, or it was
    settled.
    """
    if is_form(case):
        return isinstance(case.body, dict) and set(case.body) > {"file", "purpose"}
    content = case.operation.definition.raw.get("requestBody", {}).get("content", {})
    schema = content.get(case.media_type, {}).get("schema")
    return schema is not None and validator(LENIENT, schema).is_valid(case.body)


@schemathesis.hook
def filter_failure(_context, failure, case, response):
    """Whether a failure counts."""
    kind = type(failure).__name__
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        # OpenAPI 3.1 describes the data of an event; schemathesis holds the event as a whole to it.
        # test_answers_of_models looks at the data.
        return kind != "JsonSchemaError"
    if kind == "JsonSchemaError":
        # Answers are not narrowed.
        described = case.operation.definition.raw["responses"][str(response.status_code)]
        if "$ref" in described:
            described = DOCUMENT["components"]["responses"][described["$ref"].rsplit("/", 1)[1]]
        schema = described["content"]["application/json"]["schema"]
        return not validator(DOCUMENT, schema).is_valid(response.json())
    if kind == "RejectedPositiveData":
        return case.operation.definition.raw["operationId"] not in NEVER_ACCEPTED
    if kind == "AcceptedNegativeData":
        return not is_pardoned(case)
    return True


def test_made_up_requests():
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "base-url": URL,
            "headers": {"Authorization": f"Bearer {ADMIN}"},
            "continue-on-failure": True,
            "suppress-health-check": ["all"],
            "request-timeout": 30,
            "generation": {
                "deterministic": True,
                "max-examples": EXAMPLES,
                "no-shrink": True,
                "database": "none",
                # The key is given above; that it is asked for is tested elsewhere.
                "with-security-parameters": False,
            },
            # Nothing that these would lead to exists: no job can be made with the mock model.
            "phases": {"stateful": {"enabled": False}},
            "checks": {"enabled": False, **{check: {"enabled": True} for check in CHECKS}},
        }
    )
    schema = schemathesis.openapi.from_dict(narrowed(), config=config)
    found, requests, operations = {}, 0, set()
    for event in from_schema(schema).execute():
        if isinstance(event, (events.NonFatalError, events.FatalError)):
            error = getattr(event, "value", None) or getattr(event, "exception", None)
            found.setdefault((getattr(event, "label", ""), "error"), str(error))
        if not isinstance(event, events.ScenarioFinished):
            continue
        recorder = event.recorder
        requests += len(recorder.interactions)
        operations.add(recorder.label)
        for case_id, checks in recorder.checks.items():
            for check in checks:
                if check.failure_info is None:
                    continue
                sent = recorder.interactions.get(case_id)
                failure = check.failure_info.failure
                where = (recorder.label, check.name)
                found.setdefault(where, f"{failure.title}: {failure.message}\n{show(sent)}")
    print(f"       {requests} requests to {len(operations)} operations", flush=True)
    for (label, check), text in found.items():
        print(f"--- {label}: {check}\n{text}\n", flush=True)
    assert not found, f"{len(found)} kinds of failures"
    assert requests > 500 and len(operations) > 40
    assert request("GET", f"/v1/models/{MODEL}")[0] == 200, "the model is gone"


def show(interaction):
    """A request and its answer, short."""
    if interaction is None:
        return ""
    sent, got = interaction.request, interaction.response
    body = (sent.body or b"")[:1500]
    answer = f"{got.status_code} {got.content[:700]}" if got is not None else "no answer"
    return f"{sent.method} {sent.uri}\n{body}\n-> {answer}"


# -------------------------------------------------------------------------------------------------
# Answers

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 8}
COMPLETION = {"model": MODEL, "prompt": "Hi", "max_tokens": 8}
CHECKED = {
    "type": "string_check",
    "operation": "eq",
    "input": "{{sample.output_text}}",
    "reference": "a",
}
JUDGED = {
    "type": "score_model",
    "model": MODEL,
    "input": [{"role": "user", "content": "{{item.a}}"}],
}
MULTI = {
    "type": "multi",
    "graders": {"same": {**CHECKED, "name": "same"}, "judge": JUDGED},
    "calculate_output": "0.5 * same + 0.5 * judge",
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
]


def check_answer(method, path, body=None, *, template=None, status=200, form=None):
    """Sends a request, which the document must allow, and holds the answer to the document."""
    item = DOCUMENT["paths"][template or path.split("?")[0]]
    operation = item[method.lower()]
    if body is not None:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        validator(DOCUMENT, schema).validate(body)
    got, kind, answer = request(method, path, body, form=form)
    assert got == status, f"{method} {path}: {got}, not {status}: {answer}"
    response = operation["responses"][str(status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
    assert kind in response["content"], f"{method} {path}: {kind} is not described"
    schema = response["content"][kind]["schema"]
    if kind == "application/json":
        validator(DOCUMENT, schema).validate(answer)
        if status == 200:
            _openai_types.validate(method, path, answer)
    if kind == "text/event-stream":
        lines = [line[6:] for line in answer.split("\n") if line.startswith("data: ")]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        for chunk in chunks:
            validator(DOCUMENT, schema).validate(chunk)
        _openai_types.validate(method, path, chunks, streamed=True)
    return answer


def test_answers_of_models():
    check_answer("POST", "/v1/chat/completions", CHAT)
    check_answer(
        "POST", "/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}
    )
    called = {**CHAT, "max_tokens": 400, "tools": TOOLS, "tool_choice": "required"}
    check_answer("POST", "/v1/chat/completions", called)
    check_answer("POST", "/v1/completions", {**COMPLETION, "logprobs": 2, "echo": True})
    check_answer("POST", "/v1/completions", {**COMPLETION, "prompt": [[72, 105], "a"]})
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    check_answer("POST", "/v1/chat/completions", {**CHAT, **streamed, "logprobs": True})
    check_answer("POST", "/v1/chat/completions", {**called, **streamed})
    check_answer("POST", "/v1/completions", {**COMPLETION, **streamed, "logprobs": 1})
    for form in ["float", "base64"]:
        body = {"model": MODEL, "input": ["a", [98]], "encoding_format": form}
        check_answer("POST", "/v1/embeddings", body)
    check_answer("GET", "/v1/models")
    check_answer("GET", f"/v1/models/{MODEL}", template="/v1/models/{model}")
    check_answer("GET", "/v1/models/none", template="/v1/models/{model}", status=404)


def test_answers_of_tokenizers():
    for body in [
        {"content": "hé"},
        {"text": "a", "add_special": True, "parse_special": False},
        {"content": "hé", "with_pieces": True},
        {"prompt": "hi", "return_token_strs": True, "add_special_tokens": False},
        {"messages": CHAT["messages"], "model": MODEL},
    ]:
        check_answer("POST", "/tokenize", body)
    answer = check_answer("POST", "/detokenize", {"tokens": [72, 105]})
    assert answer == {"content": "Hi", "prompt": "Hi"}
    check_answer("POST", "/apply-template", {"messages": CHAT["messages"], "tools": TOOLS})
    check_answer("GET", "/tokenizer_info")


def test_answers_about_files_and_jobs():
    form = {"purpose": "fine-tune", "file": '{"messages": []}\n'}
    file = check_answer("POST", "/v1/files", form=form)
    check_answer("POST", "/v1/files", form={"purpose": "batch"}, status=400)
    check_answer("POST", "/v1/files", status=415)
    one = f"/v1/files/{file['id']}"
    check_answer("GET", one, template="/v1/files/{id}")
    check_answer("GET", one + "/content", template="/v1/files/{id}/content")
    check_answer("GET", "/v1/files?limit=1&order=asc&purpose=fine-tune")
    check_answer("GET", "/v1/files?limits=1", status=400)
    check_answer("GET", "/v1/fine_tuning/jobs?limit=3&metadata[a]=b")
    check_answer("GET", "/v1/fine_tuning/jobs/x", template="/v1/fine_tuning/jobs/{id}", status=404)
    tuned = {"model": MODEL, "training_file": file["id"]}
    check_answer("POST", "/v1/fine_tuning/jobs", tuned, status=422)
    check_answer("GET", "/admin/jobs?limit=3")
    check_answer("DELETE", one, template="/v1/files/{id}")
    check_answer("GET", one, template="/v1/files/{id}", status=404)


def test_answers_of_graders():
    for grader in [CHECKED, JUDGED, MULTI]:
        check_answer("POST", "/v1/fine_tuning/alpha/graders/validate", {"grader": grader})
        body = {"grader": grader, "model_sample": "a", "item": {"a": "b"}}
        check_answer("POST", "/v1/fine_tuning/alpha/graders/run", body)


def check_published():
    check_answer("POST", "/admin/published", {"name": "assistant", "model": "none"}, status=404)
    check_answer("POST", "/admin/published", {"name": MODEL, "model": MODEL}, status=409)
    check_answer("POST", "/admin/published", {"name": "assistant", "model": MODEL})
    check_answer("GET", "/admin/published")
    one = "/admin/published/assistant"
    check_answer("POST", one + "/rollback", template="/admin/published/{name}/rollback", status=409)
    check_answer("DELETE", one, template="/admin/published/{name}")
    check_answer("DELETE", one, template="/admin/published/{name}", status=404)


def test_answers_for_operators():
    for path in ["/health", "/ready", "/version", "/metrics", "/admin/models", "/admin/adapters"]:
        check_answer("GET", path)
    check_published()
    check_answer("POST", "/admin/models", {"model": "none"}, status=404)
    check_answer("POST", "/admin/adapters", {"name": "none"}, status=404)


def test_keys_are_asked_for():
    for path, item in DOCUMENT["paths"].items():
        for method, operation in item.items():
            if method == "parameters":
                continue
            at = path.replace("{", "").replace("}", "")
            status, _, answer = request(method.upper(), at, key="wrong")
            if operation["security"]:
                assert status == 401, f"{method} {path}: {status}"
                validator(DOCUMENT, reference("Error")).validate(answer)
            else:
                assert status == 200, f"{method} {path}: {status}"


# -------------------------------------------------------------------------------------------------
# Refusals: the document and the server refuse the same

HI = CHAT["messages"]
REFUSED = [
    # What is wrong, the path, and the body.
    ("unknown key", "/v1/chat/completions", {**CHAT, "temprature": 1}),
    ("no model", "/v1/chat/completions", {"messages": HI}),
    ("empty model", "/v1/chat/completions", {**CHAT, "model": ""}),
    ("no messages", "/v1/chat/completions", {"model": MODEL}),
    ("empty list of messages", "/v1/chat/completions", {**CHAT, "messages": []}),
    ("null messages", "/v1/chat/completions", {**CHAT, "messages": None}),
    ("role", "/v1/chat/completions", {**CHAT, "messages": [{"role": "king", "content": "a"}]}),
    ("no content", "/v1/chat/completions", {**CHAT, "messages": [{"role": "user"}]}),
    (
        "empty content",
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": []}]},
    ),
    (
        "an image",
        "/v1/chat/completions",
        {
            **CHAT,
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        },
    ),
    ("a message's key", "/v1/chat/completions", {**CHAT, "messages": [{**HI[0], "mood": 1}]}),
    ("nothing said", "/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant"}]}),
    (
        "whose result",
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "tool", "content": "a"}]},
    ),
    ("temperature", "/v1/chat/completions", {**CHAT, "temperature": 2.1}),
    ("temperature's type", "/v1/chat/completions", {**CHAT, "temperature": "hot"}),
    ("n", "/v1/chat/completions", {**CHAT, "n": 0}),
    ("n is large", "/v1/chat/completions", {**CHAT, "n": 17}),
    ("top_logprobs", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}),
    ("max_tokens", "/v1/chat/completions", {**CHAT, "max_tokens": 0}),
    ("stop", "/v1/chat/completions", {**CHAT, "stop": ["a"] * 17}),
    ("an empty stop", "/v1/chat/completions", {**CHAT, "stop": [""]}),
    ("logit_bias", "/v1/chat/completions", {**CHAT, "logit_bias": {"a": 1}}),
    ("bias", "/v1/chat/completions", {**CHAT, "logit_bias": {"1": 101}}),
    (
        "a tool's name",
        "/v1/chat/completions",
        {**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]},
    ),
    ("tool_choice", "/v1/chat/completions", {**CHAT, "tools": TOOLS, "tool_choice": "maybe"}),
    ("response_format", "/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}),
    (
        "no schema",
        "/v1/chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {}}},
    ),
    ("effort", "/v1/chat/completions", {**CHAT, "reasoning_effort": "huge"}),
    ("a neutral one", "/v1/chat/completions", {**CHAT, "use_beam_search": True}),
    ("audio", "/v1/chat/completions", {**CHAT, "audio": {}}),
    ("false is something", "/v1/chat/completions", {**CHAT, "unknown": False}),
    (
        "stream's options",
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"x": 1}},
    ),
    ("empty prompts", "/v1/completions", {**COMPLETION, "prompt": []}),
    ("an empty prompt of tokens", "/v1/completions", {**COMPLETION, "prompt": [[]]}),
    ("a negative token", "/v1/completions", {**COMPLETION, "prompt": [-1]}),
    ("logprobs", "/v1/completions", {**COMPLETION, "logprobs": True}),
    ("empty input", "/v1/embeddings", {"model": MODEL, "input": ""}),
    ("inputs", "/v1/embeddings", {"model": MODEL, "input": ["a", ""]}),
    (
        "encoding_format",
        "/v1/embeddings",
        {"model": MODEL, "input": "a", "encoding_format": "int8"},
    ),
    ("dimensions", "/v1/embeddings", {"model": MODEL, "input": "a", "dimensions": 0}),
    ("both forms", "/tokenize", {"content": "a", "prompt": "b"}),
    ("no text", "/tokenize", {"model": MODEL}),
    ("tokens", "/detokenize", {"tokens": ["a"]}),
    ("no tokens", "/detokenize", {}),
    ("template's key", "/apply-template", {"messages": HI, "temperature": 1}),
    ("score", "/v1/score", {"model": MODEL, "input": []}),
    (
        "epochs",
        "/v1/fine_tuning/jobs",
        {"model": MODEL, "training_file": "f", "hyperparameters": {"n_epochs": 0}},
    ),
    (
        "method",
        "/v1/fine_tuning/jobs",
        {"model": MODEL, "training_file": "f", "method": {"type": "ppo"}},
    ),
    (
        "no grader",
        "/v1/fine_tuning/jobs",
        {
            "model": MODEL,
            "training_file": "f",
            "method": {"type": "reinforcement", "reinforcement": {}},
        },
    ),
    (
        "integrations",
        "/v1/fine_tuning/jobs",
        {"model": MODEL, "training_file": "f", "integrations": [{}]},
    ),
    (
        "metadata",
        "/v1/fine_tuning/jobs",
        {"model": MODEL, "training_file": "f", "metadata": {"a": 1}},
    ),
    (
        "python",
        "/v1/fine_tuning/alpha/graders/validate",
        {"grader": {"type": "python", "source": ""}},
    ),
    (
        "operation",
        "/v1/fine_tuning/alpha/graders/validate",
        {"grader": {**CHECKED, "operation": "is"}},
    ),
    ("a grader's key", "/v1/fine_tuning/alpha/graders/validate", {"grader": {**CHECKED, "x": ""}}),
    (
        "neither bound",
        "/v1/fine_tuning/alpha/graders/validate",
        {"grader": {"type": "length", "unit": "words"}},
    ),
    (
        "a function's name",
        "/v1/fine_tuning/alpha/graders/validate",
        {"grader": {**MULTI, "graders": {"max": CHECKED}}},
    ),
    ("no sample", "/v1/fine_tuning/alpha/graders/run", {"grader": CHECKED}),
    ("kind", "/admin/jobs", {"kind": "dance", "data": {"train": "f"}}),
    ("no type", "/admin/models/{name}/quantize", {}),
    ("a type", "/admin/models/{name}/quantize", {"type": "Q9"}),
    ("null pure", "/admin/models/{name}/quantize", {"type": "Q8_0", "pure": None}),
    ("no models", "/admin/jobs", {"kind": "evaluate", "evaluate": {"models": [], "text": "f"}}),
    (
        "a share",
        "/admin/jobs",
        {"kind": "evaluate", "evaluate": {"models": ["a"], "min_accuracy": {"t": 2}}},
    ),
    ("a spec's key", "/admin/jobs", {"kind": "sft", "data": {"train": "f"}, "x": None}),
    (
        "null seed",
        "/admin/jobs",
        {"kind": "sft", "model": MODEL, "data": {"train": "f"}, "seed": None},
    ),
    ("scale", "/admin/adapters", {"name": "a", "scale": 101}),
    ("no name", "/admin/adapters", {}),
    ("null model", "/admin/models", {"model": None}),
    ("all of it", "/admin/published", {"name": "a", "model": MODEL, "share": 1}),
    ("no model", "/admin/published", {"name": "a"}),
]


def test_refusals():
    wrong = []
    for what, path, body in REFUSED:
        content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        if validator(DOCUMENT, schema).is_valid(body):
            wrong.append(f"{path}, {what}: the document allows it")
        status, _, answer = request("POST", path, body)
        # 400: the form is wrong. Others are about what a request names.
        if status != 400:
            wrong.append(f"{path}, {what}: the server answers {status}: {answer}")
    assert not wrong, "\n".join(wrong)


ACCEPTED = [
    # What says nothing, and what other clients send.
    (
        "/v1/chat/completions",
        {**CHAT, "temperature": None, "tools": [], "stop": "", "tool_choice": None},
    ),
    ("/v1/chat/completions", {**CHAT, "enable_thinking": False, "skip_special_tokens": True}),
    ("/v1/chat/completions", {**CHAT, "do_sample": False, "cache_prompt": False, "top_k": -1}),
    (
        "/v1/chat/completions",
        {**CHAT, "use_beam_search": False, "modalities": ["text"], "mirostat": 0},
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "seed": -1, "user": "u", "metadata": {"a": 1}, "store": False},
    ),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [{**HI[0], "cache_control": {"type": "ephemeral"}}]},
    ),
    (
        "/v1/chat/completions",
        {
            **CHAT,
            "messages": [
                HI[0],
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "function": {"name": "f"}}],
                },
                {"role": "tool", "content": "1", "tool_call_id": "c"},
            ],
        },
    ),
    ("/v1/completions", {**COMPLETION, "max_tokens": 0, "echo": True, "logprobs": None}),
    ("/v1/embeddings", {"model": MODEL, "input": "a", "dimensions": VECTOR}),
    ("/tokenize", {"content": None, "text": "a"}),
    ("/detokenize", {"tokens": []}),
]


def test_what_is_accepted():
    for path, body in ACCEPTED:
        check_answer("POST", path, body)


if __name__ == "__main__":
    _server.run(globals())
