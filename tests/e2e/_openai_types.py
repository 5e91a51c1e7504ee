"""Answers against the types of OpenAI's Python client, which are generated from OpenAI's document.

The client itself builds its objects without validation; here a field that is missing or of another type
is an error. Fields that only Ingot has are allowed.
"""

import copy
import json
import re

from openai import DefaultHttpxClient
from openai.types import (
    Completion,
    CreateEmbeddingResponse,
    FileDeleted,
    FileObject,
    Model,
    ModelDeleted,
)
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.alpha import GraderRunResponse, GraderValidateResponse
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

JOB = "/v1/fine_tuning/jobs/[^/]+"
TYPES = [
    ("POST", "/v1/chat/completions", ChatCompletion),
    ("POST", "/v1/completions", Completion),
    ("POST", "/v1/embeddings", CreateEmbeddingResponse),
    ("GET", "/v1/models(/.+)?", Model),
    ("DELETE", "/v1/models/.+", ModelDeleted),
    ("GET", "/v1/files(/[^/]+)?", FileObject),
    ("POST", "/v1/files", FileObject),
    ("DELETE", "/v1/files/.+", FileDeleted),
    ("GET", f"{JOB}/events", FineTuningJobEvent),
    ("GET", f"{JOB}/checkpoints", FineTuningJobCheckpoint),
    ("GET", f"/v1/fine_tuning/jobs|{JOB}", FineTuningJob),
    ("POST", f"/v1/fine_tuning/jobs|{JOB}/(cancel|pause|resume)", FineTuningJob),
    ("POST", "/v1/fine_tuning/alpha/graders/validate", GraderValidateResponse),
    ("POST", "/v1/fine_tuning/alpha/graders/run", GraderRunResponse),
]


def validate(method, path, answer, *, streamed=False):
    """Validates an answer (JSON, or the list of a stream's chunks) with status 200; says whether OpenAI
    has a type for it."""
    path = path.split("?")[0]
    for known, pattern, model in TYPES:
        if known == method and re.fullmatch(pattern, path):
            break
    else:
        return False
    if streamed and model is ChatCompletion:
        model = ChatCompletionChunk
    parts = answer if streamed else [answer]
    if not streamed and answer.get("object") == "list" and model is not CreateEmbeddingResponse:
        parts = answer["data"]
        assert isinstance(parts, list), answer
    for part in parts:
        if model is CreateEmbeddingResponse:
            # The client decodes base64 before it builds the object.
            vectors = [row["embedding"] for row in part["data"]]
            if all(isinstance(vector, str) for vector in vectors):
                continue
        model.model_validate_json(json.dumps(as_typed(model, part, streamed)), strict=True)
    return True


def as_typed(model, part, streamed):
    """An answer without what OpenAI's server sends, too, although its types leave it out."""
    part = copy.deepcopy(part)
    if model is Completion:
        # A streamed choice has no reason before its end. The first token of a prompt that is echoed has no log-probability: null.
        for choice in part["choices"]:
            if streamed and choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
            for key in ("token_logprobs", "top_logprobs"):
                if choice["logprobs"] and (choice["logprobs"][key] or [0])[0] is None:
                    choice["logprobs"][key].pop(0)
    grader = part.get("grader")
    if model is GraderValidateResponse and grader and grader["type"] == "multi":
        # `graders` is an object of graders by name in the guide, and one grader in the types.
        grader["graders"] = next(iter(grader["graders"].values()))
    return part


def http_client():
    """What an OpenAI client is given to validate every answer of JSON that it gets."""

    def check(response):
        kind = response.headers.get("content-type", "")
        # A stream is read by the client. The content of a file may be JSON, too.
        if (
            response.status_code == 200
            and kind.startswith("application/json")
            and not response.request.url.path.endswith("/content")
        ):
            response.read()
            validate(response.request.method, response.request.url.path, response.json())

    return DefaultHttpxClient(event_hooks={"response": [check]})
