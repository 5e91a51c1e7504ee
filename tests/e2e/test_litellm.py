"""Conversations through litellm, as agents have them: each answer's message is sent back as litellm
gives it.

    INGOT_BIN=target/release/ingot python tests/e2e/test_litellm.py [NAME…]

Uses the server at INGOT_URL (with INGOT_API_KEY, and INGOT_MODEL if not the first), or starts one from
INGOT_BIN. Needs the PyPI package litellm.
"""

import json
import os

# litellm would look up prices on the web.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm

from _server import find_or_start, run

URL, MODEL, KEY = find_or_start()
litellm.suppress_debug_info = True
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


def complete(messages, **more):
    more = {"max_tokens": 24, "temperature": 0, **more}
    options = {"api_base": URL + "/v1", "api_key": KEY, "num_retries": 0}
    return litellm.completion(model=f"openai/{MODEL}", messages=messages, **options, **more)


def test_three_turns():
    messages = []
    for question in ["Say hello.", "Say it in French.", "Thank you."]:
        messages.append({"role": "user", "content": question})
        answer = complete(messages)
        assert answer.choices[0].message.content and answer.usage.completion_tokens > 0
        # All that litellm adds goes back: provider_specific_fields and the like.
        messages.append(answer.choices[0].message.model_dump())
    assert len(messages) == 6


def test_a_call_and_its_result():
    messages = [{"role": "user", "content": "What is the weather in Rome?"}]
    answer = complete(messages, tools=[TOOL], tool_choice="required", max_tokens=128)
    (call, *_) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    messages.append(answer.choices[0].message.model_dump())
    for call in answer.choices[0].message.tool_calls:
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 21}'}
        messages.append(result)
    answer = complete(messages, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content
    messages.append(answer.choices[0].message.model_dump())
    messages.append({"role": "user", "content": "And in Paris?"})
    assert complete(messages, tools=[TOOL], tool_choice="none").choices[0].message.content


def test_streams():
    messages = [{"role": "user", "content": "Say hello."}]
    whole = complete(messages).choices[0].message.content
    chunks = list(complete(messages, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(deltas) == whole
    built = litellm.stream_chunk_builder(chunks, messages=messages)
    assert built.choices[0].message.content == whole and built.usage.completion_tokens > 0
    messages.append(built.choices[0].message.model_dump())
    messages.append({"role": "user", "content": "Again."})
    assert complete(messages).choices[0].message.content


def test_cached_prompts_are_marked_for_other_providers():
    # What agents add for Anthropic's models changes nothing here.
    mark = {"cache_control": {"type": "ephemeral"}}
    text = {"type": "text", "text": "You are brief.", **mark}
    messages = [{"role": "system", "content": [text]}, {"role": "user", "content": "Hello.", **mark}]
    plain = [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Hello."}]
    marked, unmarked = complete(messages), complete(plain)
    assert marked.choices[0].message.content == unmarked.choices[0].message.content
    assert marked.usage.prompt_tokens == unmarked.usage.prompt_tokens


def test_errors():
    for fields, kind in [
        ({"temperature": 9}, litellm.BadRequestError),
        ({"max_tokens": -1}, litellm.BadRequestError),
        ({"api_key": "sk-wrong"}, litellm.AuthenticationError),
        ({"model": "openai/none"}, litellm.NotFoundError),
    ]:
        options = {"model": f"openai/{MODEL}", "api_key": KEY, "num_retries": 0, **fields}
        try:
            messages = [{"role": "user", "content": "Hi."}]
            litellm.completion(messages=messages, api_base=URL + "/v1", **options)
        except kind:
            continue
        raise AssertionError(f"{fields}: accepted")
    try:
        complete([{"role": "user", "content": "word " * 20_000}])
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("a prompt that is longer than the context was accepted")


def test_embeddings():
    options = {"api_base": URL + "/v1", "api_key": KEY, "encoding_format": "float"}
    answer = litellm.embedding(model=f"openai/{MODEL}", input=["a", "b"], **options)
    assert len(answer.data) == 2 and len(answer.data[0]["embedding"]) > 100


if __name__ == "__main__":
    run(globals())
