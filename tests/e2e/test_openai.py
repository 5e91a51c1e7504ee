"""End-to-end tests with the official Python client.

    INGOT_URL=http://127.0.0.1:8000 python tests/e2e/test_openai.py [NAME…]

Without INGOT_URL a server is started from INGOT_BIN. INGOT_MODEL is a model's name (default: the
first one), INGOT_API_KEY the server's key, where it has one, INGOT_EMBED_MODEL a model that embeds
(without it, embeddings are tested for their refusal where the model cannot embed). Names choose
tests. The model may be small and dumb: structure is asserted, not wit.
"""

import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from _openai_types import http_client
from _server import find_or_start, run

URL, MODEL, KEY = find_or_start()
EMBED_MODEL = os.environ.get("INGOT_EMBED_MODEL")
OPTIONS = dict(base_url=URL + "/v1", api_key=KEY or "none", timeout=120, max_retries=0)

client = OpenAI(**OPTIONS, http_client=http_client())
HELLO = [{"role": "user", "content": "Say hello to my cat."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "integer"}},
            "required": ["zone"],
            "additionalProperties": False,
        },
    },
}


def chat(messages=HELLO, **more):
    more = {"max_tokens": 16, "temperature": 0, **more}
    return client.chat.completions.create(model=MODEL, messages=messages, **more)


def complete(prompt="Once upon a time", **more):
    more = {"max_tokens": 8, "temperature": 0, **more}
    return client.completions.create(model=MODEL, prompt=prompt, **more)


def raises(kind, call, **fields):
    try:
        call()
    except kind as error:
        for name, expected in fields.items():
            got = getattr(error, name)
            assert got == expected, f"{name} is {got!r}, not {expected!r}: {error}"
        return error
    raise AssertionError(f"no {kind.__name__}")


# --- chat ----------------------------------------------------------------------------------------


def test_chat():
    answer = chat()
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL and abs(answer.created - time.time()) < 600
    assert answer.system_fingerprint
    choice = answer.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant"
    assert isinstance(choice.message.content, str) and choice.message.content
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")


def test_usage_and_length():
    answer = chat(max_tokens=3, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 3 and usage.prompt_tokens > 5
    assert usage.total_tokens == usage.prompt_tokens + 3
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens
    newer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert newer.usage.completion_tokens == 3


def test_text_parts_and_roles():
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    answer = chat(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts, "name": "ann"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Again."},
        ]
    )
    assert answer.choices[0].message.content


def test_stream():
    whole = chat(seed=1)
    stream = chat(seed=1, stream=True, stream_options={"include_usage": True})
    text, reasons, roles, usages, ids = "", [], [], [], set()
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        ids.add(chunk.id)
        usages.append(chunk.usage)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content, (text, whole.choices[0].message.content)
    assert reasons == [whole.choices[0].finish_reason] and roles == ["assistant"]
    assert len(ids) == 1
    assert usages[-1].completion_tokens == whole.usage.completion_tokens
    assert all(usage is None for usage in usages[:-1])


def test_stream_without_usage():
    assert all(chunk.usage is None and chunk.choices for chunk in chat(stream=True))


def test_n():
    answer = chat(n=3, temperature=1, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert all(choice.message.content is not None for choice in answer.choices)
    assert answer.usage.completion_tokens <= 48
    texts = {}
    for chunk in chat(n=3, temperature=1, seed=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert sorted(texts) == [0, 1, 2]


def test_seed():
    def once(seed):
        return chat(temperature=1, seed=seed, max_tokens=24).choices[0].message.content

    assert once(42) == once(42)
    assert len({once(seed) for seed in range(5)}) > 1
    assert len({chat(temperature=1, max_tokens=24).choices[0].message.content for _ in range(4)}) > 1


def test_sampling_parameters():
    answer = chat(
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=3,
        user="someone",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "typical_p": 0.95,
            "repetition_penalty": 1.1,
            "dry_multiplier": 0.8,
            "dry_base": 1.75,
            "dry_allowed_length": 2,
            "dry_sequence_breakers": ["\n"],
            "xtc_probability": 0.1,
            "xtc_threshold": 0.1,
            "priority": 1,
            "speculative.n_max": 0,
            "prompt_cache_key": "k",
            "safety_identifier": "s",
            "chat_template_kwargs": {"enable_thinking": False},
        },
    )
    assert answer.choices[0].message.content is not None


def test_logit_bias():
    first = chat(max_tokens=1, logprobs=True, top_logprobs=2).choices[0].logprobs.content[0]
    ids = tokenize(first.token)
    if len(ids) != 1:
        return
    banned = chat(max_tokens=1, logit_bias={str(ids[0]): -100}, logprobs=True)
    assert banned.choices[0].logprobs.content[0].token != first.token


def test_logprobs():
    choice = chat(logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert 0 < len(tokens) <= 16
    for token in tokens:
        assert token.logprob <= 0 and bytes(token.bytes) is not None
        assert len(token.top_logprobs) == 3
        ranked = [top.logprob for top in token.top_logprobs]
        assert ranked == sorted(ranked, reverse=True)
        # Greedy: the chosen token is the likeliest.
        assert abs(ranked[0] - token.logprob) < 1e-4
    written = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
    assert choice.message.content.strip() in written
    streamed = []
    for chunk in chat(logprobs=True, top_logprobs=3, stream=True):
        for part in chunk.choices:
            streamed += part.logprobs.content if part.logprobs else []
    assert [token.token for token in streamed] == [token.token for token in tokens]


def test_stop():
    # llama.cpp rounds a prompt that is cached and one that is not a little differently: compare
    # cached ones.
    chat(max_tokens=32)
    text = chat(max_tokens=32).choices[0].message.content
    middle = text[len(text) // 2 :][:3]
    stopped = chat(max_tokens=32, stop=[middle, "never to be seen"])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == text[: text.index(middle)].rstrip() or (
        middle not in stopped.choices[0].message.content
    )
    streamed = "".join(
        choice.delta.content or ""
        for chunk in chat(max_tokens=32, stop=middle, stream=True)
        for choice in chunk.choices
    )
    assert middle not in streamed and text.startswith(streamed)


def test_unicode_stream():
    messages = [{"role": "user", "content": "Répète: 😀 日本語 ñ ü 𝄞 👩‍👩‍👧"}]
    text = ""
    for chunk in chat(messages, max_tokens=48, temperature=1.5, seed=11, stream=True):
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert text.encode() is not None
    # A regex that only emoji match makes every token a piece of a character.
    emoji = {"type": "regex", "regex": "[😀-😏]{4}"}
    text = ""
    for chunk in chat(max_tokens=40, stream=True, extra_body={"response_format": emoji}):
        for choice in chunk.choices:
            text += choice.delta.content or ""
    assert len(text) == 4 and all("😀" <= letter <= "😏" for letter in text), text


# --- structured output ---------------------------------------------------------------------------


class Pet(BaseModel):
    name: str
    age: int
    tame: bool


def pet_schema():
    schema = Pet.model_json_schema()
    schema["additionalProperties"] = False
    schema["properties"]["name"]["maxLength"] = 12
    schema["properties"]["age"].update(minimum=0, maximum=99)
    return schema


def test_json_schema():
    form = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": pet_schema()}}
    for seed in range(3):
        answer = chat(response_format=form, max_tokens=120, temperature=1, seed=seed)
        assert answer.choices[0].finish_reason == "stop"
        pet = json.loads(answer.choices[0].message.content)
        assert set(pet) == {"name", "age", "tame"} and 0 <= pet["age"] <= 99
    text = "".join(
        choice.delta.content or ""
        for chunk in chat(response_format=form, max_tokens=120, stream=True)
        for choice in chunk.choices
    )
    Pet.model_validate_json(text)


def test_parse():
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "My cat Tom is 3 years old and tame. As JSON."}],
        response_format=Pet,
        max_tokens=200,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)


def test_json_object():
    schema = {"type": "json_object"}
    messages = [{"role": "user", "content": 'Answer with {"ok": true} as JSON.'}]
    answer = chat(messages, response_format=schema, max_tokens=200)
    assert answer.choices[0].message.content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_regex_and_lark():
    form = {"type": "regex", "regex": "(yes|no), [0-9]{2}%"}
    text = chat(extra_body={"response_format": form}).choices[0].message.content
    assert text[-1] == "%" and text.split(",")[0] in ("yes", "no"), text
    form = {"type": "grammar", "grammar": 'start: "<" WORD ">"\nWORD: /[a-z]{1,5}/'}
    text = chat(extra_body={"response_format": form}).choices[0].message.content
    assert text[0] == "<" and text[-1] == ">", text


def test_bad_formats():
    def with_format(form):
        return lambda: chat(extra_body={"response_format": form})

    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}
    raises(openai.BadRequestError, with_format({"type": "json_schema", "json_schema": schema}))
    raises(openai.BadRequestError, with_format({"type": "regex", "regex": "(["}))
    raises(openai.BadRequestError, with_format({"type": "grammar", "grammar": "start: nowhere"}))
    raises(openai.BadRequestError, with_format({"type": "xml"}), param="response_format.type")


def unique(pairs):
    """An object of JSON whose keys must differ."""
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), f"a key repeats: {keys}"
    return dict(pairs)


ABOUT = ["a cat", "Paris", "the sea", "tea", "a train", "Mozart", "rain", "the moon", "bread", "chess"]


def test_objects_are_closed():
    """Properties without additionalProperties are all that an object has."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "facts": {
                "type": "array",
                "maxItems": 2,
                "items": {"type": "object", "properties": {"fact": {"type": "string", "maxLength": 30}}},
            },
        },
        "required": ["name"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for subject in ABOUT:
        ask = [{"role": "user", "content": f"Describe {subject} as JSON."}]
        choice = chat(ask, response_format=form, max_tokens=200).choices[0]
        assert choice.finish_reason == "stop", choice
        found = json.loads(choice.message.content, object_pairs_hook=unique)
        assert set(found) <= {"name", "facts"} and "name" in found, found
        assert all(set(fact) <= {"fact"} for fact in found.get("facts", [])), found


def test_open_objects_have_different_keys():
    schema = {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9, "minimum": 0},
              "minProperties": 4, "maxProperties": 6}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(4):
        ask = [{"role": "user", "content": "Count the words: a b a c a d."}]
        choice = chat(ask, response_format=form, max_tokens=300, temperature=1, seed=seed).choices[0]
        if choice.finish_reason == "stop":
            found = json.loads(choice.message.content, object_pairs_hook=unique)
            assert 4 <= len(found) <= 6, found


# --- tools ---------------------------------------------------------------------------------------


def check_call(call):
    assert call.type == "function" and call.id
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("c", "f")
    else:
        assert call.function.name == "get_time" and isinstance(arguments["zone"], int)
    return arguments


ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


def test_tools_required():
    for seed in range(2):
        answer = chat(
            ASK, tools=[WEATHER, TIME], tool_choice="required", temperature=1, seed=seed,
            max_tokens=200, parallel_tool_calls=False,
        )
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls", choice
        assert len(choice.message.tool_calls) == 1 and not choice.message.content
        check_call(choice.message.tool_calls[0])


def test_tools_named():
    named = {"type": "function", "function": {"name": "get_time"}}
    answer = chat(ASK, tools=[WEATHER, TIME], tool_choice=named, max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_time"
    check_call(call)


def test_tools_auto_and_none():
    answer = chat(ASK, tools=[WEATHER], max_tokens=100)
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    if answer.choices[0].finish_reason == "tool_calls":
        check_call(message.tool_calls[0])
    answer = chat(ASK, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens == chat(ASK).usage.prompt_tokens


def test_tools_stream():
    stream = chat(ASK, tools=[WEATHER], tool_choice="required", max_tokens=200, stream=True,
                  parallel_tool_calls=False)
    names, ids, arguments, pieces, reason = [], [], "", 0, None
    for chunk in stream:
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                assert call.index == 0
                names += [call.function.name] if call.function.name else []
                ids += [call.id] if call.id else []
                arguments += call.function.arguments or ""
                pieces += 1
    assert names == ["get_weather"] and len(ids) == 1 and reason == "tool_calls"
    assert pieces > 2, "arguments come in pieces"
    assert set(json.loads(arguments)) == {"city", "unit"}


def test_tools_round_trip():
    answer = chat(ASK, tools=[WEATHER], tool_choice="required", max_tokens=200,
                  parallel_tool_calls=False)
    message = answer.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny, 20 c"}
    # The client's own object is replayed, with all its nulls.
    answer = chat([*ASK, message, result], tools=[WEATHER], max_tokens=30)
    assert answer.choices[0].message.content is not None or answer.choices[0].message.tool_calls


def gathered(stream):
    """Content, tool calls and finish reason of a stream."""
    content, calls, reason = "", {}, None
    for chunk in stream:
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or []:
                name, arguments = calls.get(call.index, ("", ""))
                calls[call.index] = (name + (call.function.name or ""),
                                     arguments + (call.function.arguments or ""))
    return content, list(calls.values()), reason


def test_a_call_that_is_cut_off_is_no_content():
    cuts = [dict(max_tokens=tokens) for tokens in (1, 4, 6, 12, 20)]
    cuts += [dict(max_tokens=200, stop=stop) for stop in ('"name"', "arguments", '"city"')]
    for cut in cuts:
        more = dict(tools=[WEATHER], tool_choice="required", **cut)
        choice = chat(ASK, **more).choices[0]
        message = choice.message
        assert not message.content, (cut, message)
        assert choice.finish_reason == ("stop" if "stop" in cut else "length"), (cut, choice)
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        assert gathered(chat(ASK, stream=True, **more)) == ("", calls, choice.finish_reason), cut


def test_calls_do_not_repeat():
    for seed in range(3):
        more = dict(tools=[WEATHER, TIME], tool_choice="required", max_tokens=250, temperature=0.7,
                    seed=seed)
        choice = chat(ASK, **more).choices[0]
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        told = [(name, json.dumps(json.loads(text))) for name, text in calls[: 1 if
                choice.finish_reason == "length" else None]]
        assert calls and len(set(told)) == len(told), calls
        assert not choice.message.content, choice
        assert gathered(chat(ASK, stream=True, **more)) == ("", calls, choice.finish_reason)


def test_a_function_without_parameters_has_no_arguments():
    for function in ({"name": "now"}, {"name": "now", "parameters": {}},
                     {"name": "now", "parameters": {"type": "object", "properties": {}}}):
        tool = {"type": "function", "function": function}
        answer = chat(ASK, tools=[tool], tool_choice="required", max_tokens=60)
        for call in answer.choices[0].message.tool_calls:
            assert json.loads(call.function.arguments) == {}, answer
        assert answer.choices[0].finish_reason == "tool_calls", answer


def test_replayed_messages_of_other_clients():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": "Hello!", "tool_calls": None, "function_call": None,
         "provider_specific_fields": {"refusal": None}, "reasoning_details": [], "phase": "final"},
        {"role": "user", "content": "Bye"},
    ]
    plain = [{"role": m["role"], "content": m["content"] if i else "Hi"} for i, m in enumerate(messages)]
    assert chat(messages).usage.prompt_tokens == chat(plain).usage.prompt_tokens


def test_bad_tools():
    bad = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"a": {"type": "object", "propertyNames": {"maxLength": 2}}}}}}
    error = raises(
        openai.BadRequestError,
        lambda: chat(tools=[WEATHER, bad], tool_choice="required"),
        param="tools[1].function.parameters",
    )
    assert "`f`" in error.message and "propertyNames" in error.message, error
    raises(
        openai.BadRequestError,
        lambda: chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "x"}}),
        param="tool_choice",
    )
    raises(openai.BadRequestError, lambda: chat(tool_choice="required"), param="tool_choice")
    raises(
        openai.BadRequestError,
        lambda: chat(functions=[WEATHER["function"]]),
        param="functions",
    )


# --- completions ---------------------------------------------------------------------------------


def test_completion():
    answer = complete()
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text and answer.usage.completion_tokens <= 8
    streamed = "".join(chunk.choices[0].text for chunk in complete(stream=True))
    assert streamed == answer.choices[0].text


def test_completion_batch_and_tokens():
    answer = complete(["Once upon", "The sky is"], n=2, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    ids = tokenize("The sky is", add_special=True)
    by_tokens, by_text = complete(ids), complete("The sky is")
    assert by_tokens.choices[0].text == by_text.choices[0].text
    assert by_tokens.usage.prompt_tokens == by_text.usage.prompt_tokens == len(ids)
    both = complete([ids, ids])
    assert both.choices[0].text == both.choices[1].text == by_text.choices[0].text


def test_completion_echo_and_logprobs():
    prompt = "The sky is blue"
    answer = complete(prompt, echo=True, logprobs=2, max_tokens=4)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt) and len(choice.text) > len(prompt)
    logprobs = choice.logprobs
    counts = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)}
    counts.add(len(logprobs.top_logprobs))
    assert counts == {answer.usage.total_tokens}, counts
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    scored = complete(prompt, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert scored.text == prompt
    pairs = list(zip(scored.logprobs.token_logprobs, logprobs.token_logprobs))[1:]
    assert pairs and all(abs(a - b) < 0.05 for a, b in pairs), pairs
    plain = complete(prompt, logprobs=1).choices[0]
    assert "".join(plain.logprobs.tokens) == plain.text and plain.logprobs.text_offset[0] == 0


def test_completion_suffix():
    try:
        assert complete("def f(", suffix="return x").choices[0].text is not None
    except openai.BadRequestError as error:
        assert error.param == "suffix", error


def test_ignore_eos():
    answer = complete(max_tokens=40, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 40 and answer.choices[0].finish_reason == "length"


# --- embeddings, models, helpers -----------------------------------------------------------------


def test_embeddings():
    model = EMBED_MODEL or MODEL
    try:
        answer = client.embeddings.create(model=model, input=["a cat", "a dog", "a cat"])
    except openai.BadRequestError as error:
        assert EMBED_MODEL is None and error.param == "model", error
        return
    assert [item.index for item in answer.data] == [0, 1, 2]
    one, two, three = (item.embedding for item in answer.data)
    assert len(one) == len(two) > 1 and one != two
    assert max(abs(a - b) for a, b in zip(one, three)) < 1e-3
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
    floats = client.embeddings.create(model=model, input="a cat", encoding_format="float")
    assert max(abs(a - b) for a, b in zip(one, floats.data[0].embedding)) < 1e-3
    assert client.embeddings.create(model=model, input=[1, 2, 3]).data[0].embedding
    client.embeddings.create(model=model, input="a", dimensions=len(one))
    raises(
        openai.BadRequestError,
        lambda: client.embeddings.create(model=model, input="a", dimensions=len(one) + 1),
        param="dimensions",
    )
    raises(
        openai.BadRequestError, lambda: client.embeddings.create(model=model, input=""), param="input"
    )


def test_models():
    ids = [model.id for model in client.models.list()]
    assert MODEL in ids
    model = client.models.retrieve(MODEL)
    assert model.id == MODEL and model.object == "model" and model.created > 0 and model.owned_by
    raises(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))


def post(path, body, base=None):
    return (base or client).with_options(base_url=URL).post(path, body=body, cast_to=object)


def tokenize(text, **more):
    return post("/tokenize", {"model": MODEL, "content": text, **more})["tokens"]


def test_tokenize():
    text = "Grüße, 世界!"
    ids = tokenize(text)
    assert ids and all(isinstance(token, int) for token in ids)
    assert post("/detokenize", {"model": MODEL, "tokens": ids})["content"].strip() == text
    pieces = tokenize(text, with_pieces=True)
    assert [piece["id"] for piece in pieces] == ids
    prompt = post("/apply-template", {"model": MODEL, "messages": HELLO})["prompt"]
    assert HELLO[0]["content"] in prompt
    raises(openai.BadRequestError, lambda: post("/tokenize", {"model": MODEL}), param="content")


# --- errors --------------------------------------------------------------------------------------


def test_bad_parameters():
    cases = [
        ("temperature", "hot"),
        ("temperature", 2.5),
        ("top_p", -1),
        ("n", 0),
        ("n", 1.5),
        ("max_tokens", -5),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999999": 1}),
        ("seed", "x"),
        ("stop", ["x"] * 17),
        ("top_logprobs", 5),
        ("min_p", 2),
        ("modalities", ["audio"]),
        ("frobnicate", 1),
    ]
    for name, value in cases:
        error = raises(
            openai.BadRequestError,
            lambda: client.chat.completions.create(
                model=MODEL, messages=HELLO, extra_body={name: value}
            ),
            param=name,
        )
        assert name in error.message and error.type == "invalid_request_error", error
    error = raises(openai.BadRequestError, lambda: chat([]), param="messages")
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
    error = raises(openai.BadRequestError, lambda: chat([{"role": "user", "content": image}]))
    assert "text only" in error.message
    chat(extra_body={"frobnicate": None, "audio": None})


def test_unknown_model():
    raises(
        openai.NotFoundError,
        lambda: client.chat.completions.create(model="no-such-model", messages=HELLO),
        code="model_not_found",
        param="model",
    )


def test_context_overflow():
    error = raises(
        openai.BadRequestError,
        lambda: chat([{"role": "user", "content": "cat " * 200_000}]),
        code="context_length_exceeded",
        param="messages",
    )
    raises(openai.BadRequestError, lambda: complete("cat " * 200_000),
           code="context_length_exceeded", param="prompt")
    assert any(letter.isdigit() for letter in error.message), error


def test_later_endpoints():
    for path in ("/v1/responses", "/v1/messages", "/v1/rerank", "/infill"):
        error = raises(openai.NotFoundError, lambda: post(path, {}))
        assert "later" in error.message, error


def test_authentication():
    if not KEY:
        return
    for key in ("wrong", KEY + "x", KEY[:-1]):
        wrong = OpenAI(**{**OPTIONS, "api_key": key})
        raises(openai.AuthenticationError, wrong.models.list, code="invalid_api_key")


# --- many at once --------------------------------------------------------------------------------


def test_concurrent_clients():
    async def one(number):
        async with AsyncOpenAI(**OPTIONS) as other:
            stream = await other.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Count to {number}."}],
                max_tokens=24,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            text, usage = "", None
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
            return text, usage

    async def all_of_them():
        return await asyncio.gather(*(one(number) for number in range(8)))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 8
    assert all(text and usage.completion_tokens > 0 for text, usage in answers)


def test_threads():
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: chat(seed=seed, temperature=1), range(8)))
    assert all(answer.choices[0].message.content is not None for answer in answers)


def test_cancellation():
    for _ in range(4):
        stream = chat(max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
        for count, _chunk in enumerate(stream):
            if count == 3:
                break
        stream.close()
    # What was cancelled no longer takes the machine's time.
    started = time.monotonic()
    chat(max_tokens=4)
    assert time.monotonic() - started < 30


if __name__ == "__main__":
    run(globals())
