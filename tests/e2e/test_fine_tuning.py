"""Fine-tuning end to end, with the official Python client and live traffic.

    python tests/e2e/test_fine_tuning.py [NAME…]

A server is started from INGOT_BIN on a data folder of its own, and killed on the way.
"""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request

import openai
from openai import OpenAI

from _browser import check_report
from _openai_types import http_client
from _server import first_model, run, start, stop

KEY, OTHER, ADMIN = "sk-end-to-end", "sk-somebody-else", "sk-operator"
DATA = tempfile.mkdtemp(prefix="ingot-tuning-")
# Long: jobs have the lowest priority, and the machine may have other work.
SECONDS = 900
# The tests in which a model answers. The others look at jobs only, and run with the native runner.
ON_BOTH_RUNNERS = [
    "test_upload_train_chat_delete",
    "test_preferences",
    "test_a_reward_model_is_trained",
    "test_a_policy_is_trained",
]


class Server:
    """A server, and what is needed to ask it."""

    def __init__(self, *more):
        options = ("--admin-key", ADMIN, "--grace-time", "5s", "--log-level", "warn", *more)
        self.url, self.process = start(f"{KEY},{OTHER}", DATA, *options)
        self.model = first_model(self.url, KEY, self.process)

    def client(self, key=KEY):
        options = {"base_url": self.url + "/v1", "api_key": key, "http_client": http_client()}
        return OpenAI(**options, timeout=120, max_retries=0)

    def admin(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read()

    def job(self, job):
        return json.loads(self.admin(f"/admin/jobs/{job}"))

    def kill(self):
        self.process.kill()
        self.process.wait()


server = Server()
client = server.client()


def examples(count=12):
    colours = ["red", "green", "blue", "black"]
    for number in range(count):
        colour = colours[number % len(colours)]
        yield {
            "messages": [
                {"role": "user", "content": f"Name a colour, number {number}."},
                {"role": "assistant", "content": f"Ahoy! The colour is {colour}, matey."},
            ]
        }


def upload(lines, name="train.jsonl", of=None):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return (of or client).files.create(file=(name, text.encode()), purpose="fine-tune")


def create(file, epochs=2, batch=4, **more):
    method = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": epochs, "batch_size": batch}},
    }
    return client.fine_tuning.jobs.create(
        training_file=file.id, **{"model": server.model, "method": method, "seed": 7, **more}
    )


def until(done, what, seconds=SECONDS):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (found := done()) is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s")


def ended(job, status="succeeded"):
    def look():
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    found = until(look, f"the end of {job.id}")
    assert found.status == status, (found, messages(job))
    return found


def messages(job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=1000)]


def step_of(job, least):
    def look():
        found = server.job(job.id)
        assert found["status"] not in ("failed", "cancelled"), found
        return found if found["progress"].get("step", 0) >= least else None

    return until(look, f"step {least} of {job.id}")


def processes(job):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                arguments = file.read().split(b"\0")
        except OSError:
            continue
        if arguments[1:2] == [b"job"] and job.id.encode() in arguments[2]:
            found.append(int(pid))
    return found


def ask(model, of=None, **more):
    return (of or client).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a colour, number 3."}],
        **{"max_tokens": 12, "temperature": 0, **more},
    )


def raises(kind, call, **fields):
    try:
        call()
    except kind as error:
        for name, expected in fields.items():
            assert getattr(error, name) == expected, (name, getattr(error, name), error)
        return error
    raise AssertionError(f"no {kind.__name__}")


class Traffic:
    """Asks now and then until it is told to stop; nothing may fail."""

    def __enter__(self):
        self.over, self.answers, self.failures = threading.Event(), 0, []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        return self

    def run(self):
        while not self.over.is_set():
            try:
                ask(server.model, max_tokens=4)
                self.answers += 1
            except Exception as error:
                self.failures.append(error)
            self.over.wait(0.5)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def adapter_digest(job):
    artifacts = json.loads(server.admin(f"/admin/jobs/{job.id}/artifacts"))["data"]
    return next(a["sha256"] for a in artifacts if a["name"].endswith(".safetensors"))


whole = {}


def test_upload_train_chat_delete():
    file = upload(examples())
    assert (file.object, file.purpose, file.filename) == ("file", "fine-tune", "train.jsonl")
    assert file.id in [found.id for found in client.files.list()]
    # OpenAI's documents know no null there.
    raw = client.files.with_raw_response.retrieve(file.id).http_response.json()
    assert "expires_at" not in raw, raw
    assert len(client.files.content(file.id).text.splitlines()) == 12
    validation = upload(examples(4), "valid.jsonl")
    before = ask(server.model).choices[0].message.content
    with Traffic() as traffic:
        job = create(
            file, epochs=6, validation_file=validation.id, suffix="pirate", metadata={"team": "sea"}
        )
        assert job.object == "fine_tuning.job" and job.status in ("validating_files", "queued")
        assert job.fine_tuned_model is None and job.metadata == {"team": "sea"}
        assert job.method.supervised.hyperparameters.n_epochs == 6
        found = ended(job)
        # Live at once, under traffic.
        answer = ask(found.fine_tuned_model)
    assert not traffic.failures and traffic.answers > 0, traffic.failures
    name = found.fine_tuned_model
    assert name.startswith(f"ft:{server.model}:ingot:pirate:") and answer.model == name
    assert found.trained_tokens > 100 and found.finished_at >= found.created_at
    assert answer.choices[0].message.content != before, before
    assert name in [model.id for model in client.models.list()]
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    metrics = [event for event in reversed(events) if event.type == "metrics"]
    losses = [event.data["train_loss"] for event in metrics if "train_loss" in event.data]
    assert len(losses) == 18 and losses[-1] < 0.8 * losses[0], losses
    assert any("full_valid_loss" in event.data for event in metrics)
    assert any(name in event.message for event in events)
    [result] = found.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(result).text)))
    assert len(rows) == 18 and rows[-1]["valid_loss"], rows[-1]
    assert rows[-1]["valid_mean_token_accuracy"], rows[-1]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoints and checkpoints[0].step_number == 18, checkpoints
    assert checkpoints[0].metrics.full_valid_loss > 0
    last = ask(checkpoints[0].fine_tuned_model_checkpoint)
    assert last.choices[0].message.content == answer.choices[0].message.content
    # Going on from what was made: an adapter is a model.
    again = create(file, epochs=1, model=name, method={"type": "supervised"})
    assert again.model == name
    client.fine_tuning.jobs.cancel(again.id)
    whole["job"], whole["file"] = job, file
    assert client.models.delete(name).deleted
    raises(openai.NotFoundError, lambda: ask(name), code="model_not_found")
    left = [model.id for model in client.models.list() if model.id.startswith(name)]
    assert not left, f"checkpoints go with their model: {left}"
    assert client.files.delete(validation.id).deleted
    raises(openai.NotFoundError, lambda: client.files.retrieve(validation.id))


def test_a_killed_job_ends_with_the_same_weights():
    file = upload(examples(24))
    jobs = [create(file, epochs=2, suffix="calm"), create(file, epochs=2, suffix="storm")]
    whole["model"] = ended(jobs[0]).fine_tuned_model
    for step in (2, 5):
        step_of(jobs[1], step)
        [pid] = until(lambda: processes(jobs[1]) or None, "the job's process")
        os.kill(pid, signal.SIGKILL)
    ended(jobs[1])
    assert any("is started again" in message for message in messages(jobs[1]))
    assert adapter_digest(jobs[0]) == adapter_digest(jobs[1])
    whole["digest"], whole["two"] = adapter_digest(jobs[0]), file


def ask_to_finish(job):
    return json.loads(server.admin(f"/admin/jobs/{job.id}/finish", {}))


def refuses_to_finish(job):
    try:
        ask_to_finish(job)
        raise AssertionError("the job was asked to finish")
    except urllib.error.HTTPError as error:
        assert error.code == 400, error
        found = json.loads(error.read())["error"]
        assert found["code"] == "invalid_job_status", found
        return found["message"]


def test_pause_resume_finish_cancel():
    file = upload(examples(24))
    job = create(file, epochs=2)
    step_of(job, 2)
    assert client.fine_tuning.jobs.pause(job.id).status == "queued"
    until(lambda: None if processes(job) else True, "the process leaves")
    assert server.job(job.id)["status"] == "paused"
    at = server.job(job.id)["progress"]["step"]
    client.fine_tuning.jobs.resume(job.id)
    step_of(job, at + 1)
    assert any(f"after step {at}" in message for message in messages(job)), messages(job)
    # A job that runs ends after its step, a paused one at its checkpoint; both are served.
    assert ask_to_finish(job)["status"] == "running"
    done = ended(job)
    progress = server.job(job.id)["progress"]
    assert at < progress["step"] < progress["total_steps"], progress
    assert ask(done.fine_tuned_model).choices[0].finish_reason
    assert "succeeded" in refuses_to_finish(job)
    job = create(file, epochs=2)
    assert "first step" in refuses_to_finish(job)
    step_of(job, 1)
    client.fine_tuning.jobs.pause(job.id)
    until(lambda: None if processes(job) else True, "the process leaves")
    assert ask_to_finish(job)["status"] == "queued"
    assert ended(job).fine_tuned_model
    job = create(file, epochs=2)
    step_of(job, 1)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    until(lambda: None if processes(job) else True, "the process leaves")
    raises(openai.BadRequestError, lambda: client.fine_tuning.jobs.resume(job.id))
    assert ended(job, "cancelled").fine_tuned_model is None


def pairs(count=16):
    for number in range(count):
        asked = {"role": "user", "content": f"Greet me, number {number}."}
        yield {
            "input": {"messages": [asked]},
            "preferred_output": [{"role": "assistant", "content": "Ahoy, matey!"}],
            "non_preferred_output": [{"role": "assistant", "content": "Good day to you."}],
        }


def test_preferences():
    file, held = upload(pairs()), upload(list(pairs(20))[16:], "held.jsonl")
    method = {
        "type": "dpo",
        "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "beta": 0.2, "learning_rate_multiplier": 30}},
    }
    job = client.fine_tuning.jobs.create(
        model=server.model, training_file=file.id, validation_file=held.id, method=method, seed=7
    )
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.2, job
    job = ended(job)
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    steps = [e.data for e in reversed(events) if e.type == "metrics" and "train_loss" in e.data]
    assert len(steps) == 12 and abs(steps[0]["train_loss"] - 0.693147) < 1e-5, steps[0]
    assert steps[-1]["train_loss"] < 0.5, steps
    assert steps[-1]["metrics"]["reward_margin"] > 0.1, steps[-1]
    held = [e.data for e in events if "full_valid_loss" in (e.data or {})]
    assert held[0]["full_valid_mean_token_accuracy"] == 1.0, held
    rows = list(csv.DictReader(io.StringIO(client.files.content(job.result_files[0]).text)))
    assert len(rows) == 12 and float(rows[-1]["reward_margin"]) > 0.1, rows[-1]
    ask(job.fine_tuned_model)
    # One answer is no pair, and a pair is no answer.
    for lines, of in ((examples(), method), (pairs(), {"type": "supervised"})):
        wrong = client.fine_tuning.jobs.create(
            model=server.model, training_file=upload(lines).id, method=of
        )
        wrong = ended(wrong, "failed")
        assert "line 1" in wrong.error.message and "pair" in wrong.error.message, wrong.error


def test_a_reward_model_is_trained():
    file, held = upload(pairs()), list(pairs(20))[16:]
    spec = {
        "kind": "reward", "model": server.model, "suffix": "taste",
        "data": {"train": file.id, "validation": upload(held, "held.jsonl").id},
        "reward": {"centering": 0.01}, "train": {"epochs": 3, "batch_size": 4, "max_length": 64},
    }
    job = json.loads(server.admin("/admin/jobs", spec))
    done = until(
        lambda: (found := server.job(job["id"]))["status"] in ("succeeded", "failed") and found or None,
        "the end of the reward model",
    )
    assert done["status"] == "succeeded", done
    assert {"adapter", "peft"} <= {artifact["type"] for artifact in done["artifacts"]}, done
    entries = json.loads(server.admin(f"/admin/jobs/{job['id']}/events?stream=false"))["data"]
    steps = [entry for entry in entries if entry["type"] == "step"]
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["reward_margin"] > steps[0]["reward_margin"], steps
    assert "adapter: " in raises_admin({**spec, "adapter": None})

    # Served, it says of the held-out pairs what the job said of them at its end.
    name = next(artifact["name"] for artifact in done["artifacts"] if artifact["type"] == "adapter")
    last = [entry for entry in entries if entry["type"] == "validation"][-1]
    for side, measured in [("preferred_output", "reward_chosen"), ("non_preferred_output", "reward_rejected")]:
        talks = [[*pair["input"]["messages"], *pair[side]] for pair in held]
        answer = score(name, talks)
        assert [item["index"] for item in answer["data"]] == list(range(len(talks))), answer
        mean = sum(item["score"] for item in answer["data"]) / len(talks)
        assert abs(mean - last["metrics"][measured]) < 0.05 * (1 + abs(mean)), (side, mean, last)
    one = score(name, talks[0])["data"]
    assert abs(one[0]["score"] - answer["data"][0]["score"]) < 1e-5, (one, answer)
    assert score(name, ["Ahoy!", "Good day."])["usage"]["prompt_tokens"] > 4

    # The best of several answers is the one that scores highest.
    asked = [{"role": "user", "content": "Greet me."}]
    more = {"model": server.model, "messages": asked, "seed": 5, "temperature": 1.2, "max_tokens": 12}
    scored = lambda texts: [
        item["score"] for item in score(name, [[*asked, {"role": "assistant", "content": text}] for text in texts])["data"]
    ]
    best = client.chat.completions.create(**more, n=2, extra_body={"best_of": 6, "reward_model": name})
    texts = [choice.message.content for choice in best.choices]
    rewards = [choice.reward for choice in best.choices]
    assert [choice.index for choice in best.choices] == [0, 1] and rewards[0] >= rewards[1], best
    assert all(abs(one - other) < 0.05 * (1 + abs(one)) for one, other in zip(rewards, scored(texts))), best
    if os.environ.get("INGOT_RUNNER") != "llama-cpp":
        # With the native runner the same seed gives the same answers.
        everything = [choice.message.content for choice in client.chat.completions.create(**more, n=6).choices]
        scores = scored(everything)
        order = sorted(range(6), key=lambda at: -scores[at])
        assert texts == [everything[at] for at in order[:2]], (best, scores, everything)
    try:
        client.chat.completions.create(**more, extra_body={"best_of": 2, "reward_model": server.model})
        raise AssertionError("a model that is no reward model was taken")
    except openai.BadRequestError as error:
        assert error.param == "reward_model", error
    bad_request = openai.BadRequestError
    raises(bad_request, lambda: ask(name), param="model")
    raises(bad_request, lambda: score(server.model, "Ahoy!"), param="model")
    raises(bad_request, lambda: score(name, [[{"role": "user", "content": "Hi"}]]), param="input[0]")
    raises(openai.NotFoundError, lambda: score("nobody", "Ahoy!"), code="model_not_found")


def test_graders():
    def run(grader, sample, **item):
        return client.fine_tuning.alpha.graders.run(grader=grader, model_sample=sample, item=item)

    check = {"type": "string_check", "name": "same", "operation": "eq",
             "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}
    assert client.fine_tuning.alpha.graders.validate(grader=check).grader.operation == "eq"
    found = run(check, "42", answer="42")
    assert found.reward == 1.0 and found.metadata.type == "string_check", found
    assert run(check, "41", answer="42").reward == 0.0
    missing = run(check, "41")
    assert missing.reward == 0.0 and missing.metadata.errors.invalid_variable_error, missing
    both = {"type": "multi", "name": "both", "calculate_output": "0.5 * same + 0.5 * close",
            "graders": {"same": check, "close": {
                "type": "text_similarity", "name": "close", "evaluation_metric": "fuzzy_match",
                "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}}}
    found = run(both, "4", answer="42")
    assert 0 < found.reward < 0.5 and found.sub_rewards["same"] == 0, found
    judge = {"type": "score_model", "name": "judge", "model": server.model, "range": [0, 10],
             "input": [{"role": "user", "content": "Rate from 0 to 10: {{sample.output_text}}"}],
             "sampling_params": {"temperature": 0, "seed": 1}}
    found = run(judge, "A red house.")
    assert 0 <= found.reward <= 10 and found.metadata.token_usage > 0, found
    assert not found.metadata.errors.api_model_grader_parse_error, found
    nobody = run({**judge, "model": "nobody"}, "A red house.")
    assert nobody.metadata.errors.api_model_grader_server_error, nobody
    bad_request = openai.BadRequestError
    python = {"type": "python", "name": "p", "source": "def grade(sample, item): return 1"}
    raises(bad_request, lambda: client.fine_tuning.alpha.graders.validate(grader=python), param="grader.type")
    raises(
        bad_request,
        lambda: client.fine_tuning.alpha.graders.validate(grader={**check, "operation": "near"}),
        param="grader.operation",
    )


def test_a_policy_is_trained():
    lines = [
        {"messages": [{"role": "user", "content": f"Name a colour, number {number}."}], "wanted": "e"}
        for number in range(8)
    ]
    spec = {
        "kind": "grpo", "model": server.model, "suffix": "short", "seed": 1,
        "data": {"train": upload(lines).id},
        "train": {"max_steps": 3, "batch_size": 2, "max_length": 96, "learning_rate": 1e-4, "checkpoint_every": 2},
        "grpo": {"num_generations": 4, "max_tokens": 12, "num_iterations": 2, "beta": 0.01, "grader": {
            "type": "multi", "name": "m", "calculate_output": "short + 0.1 * has",
            "graders": {
                "short": {"type": "length", "name": "short", "unit": "characters", "max": 8, "slack": 60},
                "has": {"type": "string_check", "name": "has", "operation": "ilike",
                        "input": "{{sample.output_text}}", "reference": "{{item.wanted}}"},
            }}},
    }

    def run(spec):
        job = json.loads(server.admin("/admin/jobs", spec))
        done = until(
            lambda: (found := server.job(job["id"]))["status"] in ("succeeded", "failed") and found or None,
            "the end of the policy",
        )
        assert done["status"] == "succeeded", done
        entries = json.loads(server.admin(f"/admin/jobs/{job['id']}/events?stream=false"))["data"]
        return done, [entry for entry in entries if entry["type"] == "step"]

    done, steps = run(spec)
    assert len(steps) == 3, steps
    for step in steps:
        assert 0 < step["reward_mean"] <= 1.1 and step["reward_short"] > 0, step
        # What the engine says of its samples is near what the trainer says of them.
        assert 0 < step["sampling_logp_difference"] < 0.3 and 0.8 < step["importance_sampling_ratio"] < 1.2, step
        assert step["kl"] >= 0 and step["grader_errors"] == 0 and 1 <= step["completion_length"] <= 12, step
    # The first two steps are on the same answers, the first of them at a ratio of exactly 1.
    assert steps[0]["reward_mean"] == steps[1]["reward_mean"] and steps[0]["kl"] < 1e-9, steps
    rollouts = lambda query="": json.loads(server.admin(f"/admin/jobs/{done['id']}/rollouts{query}"))
    table = rollouts("?step=1")["data"]
    assert len(table) == 8 and rollouts()["data"][0]["step"] == 3 and not rollouts("?step=2")["data"], table
    for row in table:
        assert row["item"]["wanted"] == "e" and isinstance(row["completion"], str) and 1 <= row["tokens"] <= 12, row
        assert set(row["sub_rewards"]) == {"short", "has"} and row["advantage"] is not None, row
        assert 0 < row["sampling_logp_difference"] < 1, row
    mean = sum(row["reward"] for row in table) / len(table)
    assert abs(mean - steps[0]["reward_mean"]) < 1e-9 and abs(sum(row["advantage"] for row in table)) < 1e-6, table
    artifact = next(made for made in done["artifacts"] if made["type"] == "rollouts")
    lines = server.admin(f"/admin/jobs/{done['id']}/artifacts/{artifact['id']}").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1] * 8 + [3] * 8, lines
    assert len(rollouts("?limit=3")["data"]) == 3 and rollouts("?limit=3")["has_more"]
    adapter = lambda done: next(made["name"] for made in done["artifacts"] if made["type"] == "adapter")
    assert ask(adapter(done)).choices[0].message.content
    # The same with a value head, which is no part of the adapter.
    block = {key: spec["grpo"][key] for key in ("num_generations", "max_tokens", "num_iterations", "grader")}
    colour = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"]}
    block["response_format"] = {"type": "json_schema", "json_schema": {"name": "colour", "schema": colour}}
    ppo = {key: value for key, value in spec.items() if key != "grpo"} | {"kind": "ppo", "ppo": block}
    done, steps = run(ppo)
    answers = [row["completion"] for row in rollouts()["data"] if row["ended"]]
    assert answers and all(json.loads(answer)["c"] in ("red", "blue") for answer in answers), answers
    wrong = {**block, "response_format": {"type": "json_schema"}}
    assert "ppo.response_format.json_schema" in raises_admin({**ppo, "ppo": wrong})
    assert len(steps) == 3, steps
    for step in steps:
        assert 0 < step["reward_mean"] <= 1.1 and step["value_loss"] > 0 and step["entropy"] > 0, step
        assert 0 < step["sampling_logp_difference"] < 0.3 and step["grader_errors"] == 0, step
    assert abs(steps[0]["kl"]) < 1e-9 and steps[0]["value_mean"] == 0 and steps[2]["value_mean"] != 0, steps
    assert ask(adapter(done)).choices[0].message.content
    message = raises_admin({**spec, "adapter": None})
    assert "swapped at every step" in message, message
    grader = {"type": "reward_model", "name": "r", "model": server.model}
    assert "no reward model" in raises_admin({**spec, "grpo": {"grader": grader}})


def test_a_constitution_is_learned():
    prompt = lambda text, **more: {"messages": [{"role": "user", "content": text}], **more}
    questions = ["Name a colour.", "Say hello.", "What is 2+2?", "Name an animal."]
    prompts = [prompt(question) for question in questions]
    prompts += [prompt(f"Name a number above {i}.", helpful=True, answer=f"{i + 1}") for i in range(3)]
    human = [
        {"prompt": "Say hello.", "chosen": "Hello! How are you?", "rejected": f"No {i}."} for i in range(6)
    ]
    principle = {"name": "question", "critique": "Does the answer end with a question?",
                 "revision": "Rewrite the answer so that it ends with a question.",
                 "comparison": "Which answer ends with a question?"}
    grader = {"type": "regex", "name": "g", "pattern": r"\?$"}
    spec = {
        "kind": "constitutional", "model": server.model, "suffix": "asks", "seed": 1,
        "data": {"train": upload(prompts).id, "human": upload(human, "human.jsonl").id},
        "constitutional": {"constitution": {"principles": [principle]}, "max_tokens": 48,
                           "min_on_topic": 0, "keep_inconsistent": True, "graders": {"question": grader}},
        "train": {"batch_size": 4, "max_length": 256},
    }
    job = json.loads(server.admin("/admin/jobs", spec))
    done = until(
        lambda: (found := server.job(job["id"]))["status"] in ("succeeded", "failed") and found or None,
        "the end of the constitutional job",
    )
    assert done["status"] == "succeeded", done
    files = {made["name"]: made for made in done["artifacts"]}
    read = lambda name: server.admin(f"/admin/jobs/{job['id']}/artifacts/{files[name]['id']}")
    lines = lambda name: [json.loads(line) for line in read(name).splitlines()]
    assert [row["prompt"] for row in lines("revisions.jsonl")] == list(range(7)), files
    assert len(lines("sft.jsonl")) >= 3 and len(lines("evaluation.jsonl")) == 7, files
    assert len(lines("comparisons.jsonl")) == 4 and len(lines("judge.jsonl")) == 6, files
    report = json.loads(read("constitutional.json"))
    assert report["human"]["accuracy"]["count"] <= 6 and report["groups"]["helpful"]["win_rate"]["count"] == 3
    assert 0 <= report["groups"]["all"]["rewards"]["question"]["after"] <= 1, report
    check_report(read("constitutional.html").decode(), "Constitutional training", "prefers what people prefer", "KL per token")
    entries = json.loads(server.admin(f"/admin/jobs/{job['id']}/events?stream=false"))["data"]
    assert [entry["metrics"] for entry in entries if entry["type"] == "validation"][0]["kl_all"] is not None
    adapter = next(made["name"] for made in done["artifacts"] if made["type"] == "adapter")
    assert ask(adapter).choices[0].finish_reason
    assert "`nobody`" in raises_status(404, {**spec, "constitutional": {**spec["constitutional"], "judge": "nobody"}})
    assert "`file-none`" in raises_admin({**spec, "data": {**spec["data"], "human": "file-none"}})


def score(model, inputs):
    return client.post("/score", body={"model": model, "input": inputs}, cast_to=object)


def raises_admin(spec):
    return raises_status(400, spec)


def raises_status(status, spec):
    try:
        server.admin("/admin/jobs", spec)
    except urllib.error.HTTPError as error:
        assert error.code == status, error
        return json.loads(error.read())["error"]["message"]
    raise AssertionError("it was taken")


def test_mistakes():
    few = create(upload(examples(9)))
    assert "at least 10" in ended(few, "failed").error.message
    bad = upload([*examples(11), {"messages": [{"role": "user", "content": "no answer"}]}])
    failed = ended(create(bad), "failed")
    assert failed.error.param == "training_file" and "line 12" in failed.error.message, failed.error
    file = upload(examples())
    bad_request = openai.BadRequestError
    raises(bad_request, lambda: create(file, method={"type": "reinforcement"}), code="missing_required_parameter")
    raises(bad_request, lambda: create(file, suffix="no spaces"), param="suffix")
    raises(bad_request, lambda: create(file, batch=0))
    raises(bad_request, lambda: create(file, validation_file="file-0"), param="validation_file")
    raises(openai.NotFoundError, lambda: create(file, model="nobody"), code="model_not_found")
    raises(
        bad_request,
        lambda: client.files.create(file=("a", b"x"), purpose="assistants"),
        param="purpose",
    )
    raises(bad_request, lambda: client.files.create(file=("a", b""), purpose="fine-tune"))
    raises(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-0"))
    raises(openai.PermissionDeniedError, lambda: client.models.delete(server.model))
    # What belongs to one key is not there for another.
    other = server.client(OTHER)
    assert file.id not in [found.id for found in other.files.list()]
    raises(openai.NotFoundError, lambda: other.files.content(file.id))
    raises(bad_request, lambda: other.fine_tuning.jobs.create(model=server.model, training_file=file.id))
    assert not other.fine_tuning.jobs.list().data
    raises(openai.NotFoundError, lambda: other.fine_tuning.jobs.cancel(few.id))


def test_the_operators_side():
    file = upload(examples())
    spec = {"kind": "sft", "model": server.model, "data": {"train": file.id}}
    spec["train"] = {"batch_size": 6, "epochs": 2, "checkpoint_every": 1, "keep_checkpoints": 2}
    spec["adapter"] = {"r": 4, "dropout": 0.05, "targets": ["q_proj", "v_proj"]}
    job = json.loads(server.admin("/admin/jobs", spec))
    with urllib.request.urlopen(server.url + "/metrics", timeout=5) as answer:
        assert b"ingot_jobs{" in answer.read()
    lines = server.admin(f"/admin/jobs/{job['id']}/events").decode().split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "data: [DONE]" in lines
    kinds = [event["type"] for event in events]
    assert kinds.count("step") == 4 and kinds.count("checkpoint") == 4, kinds
    assert kinds.index("data") < kinds.index("step")
    step = next(event for event in events if event["type"] == "step")
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes"):
        assert step[key] > 0, (key, step)
    page = server.admin(f"/admin/jobs/{job['id']}/report").decode()
    check_report(page, job["name"], "tokens_per_second", "4 of 4")
    svg = server.admin(f"/admin/jobs/{job['id']}/plot.svg").decode()
    assert svg.startswith("<svg") and "learning rate" in svg
    found = server.job(job["id"])
    assert found["status"] == "succeeded" and found["progress"]["step"] == 4
    adapter = next(a for a in found["artifacts"] if a["type"] == "adapter")
    content = server.admin(f"/admin/jobs/{job['id']}/artifacts/{adapter['id']}")
    assert len(content) == adapter["bytes"] and content[:4] == b"GGUF"
    ask(adapter["name"])
    large = {**spec, "adapter": None, "train": {"max_length": 1 << 20}}
    wrong = ({**spec, "kind": "dance"}, {**spec, "more": 1}, {**spec, "train": {"epochs": -1}})
    for refused, status in (*((spec, 400) for spec in wrong), (large, 422)):
        try:
            server.admin("/admin/jobs", refused)
            raise AssertionError(refused)
        except urllib.error.HTTPError as error:
            assert error.code == status, error
            text = error.read().decode()
            assert status == 400 or "insufficient_memory" in text and "GiB" in text, text


def job_ended(spec, status="succeeded", path="/admin/jobs"):
    """Creates a job of the operator, and returns it at its end."""
    job = json.loads(server.admin(path, spec))

    def look():
        found = server.job(job["id"])
        return found if found["status"] in ("succeeded", "failed", "cancelled") else None

    found = until(look, f"the end of {job['id']}")
    assert found["status"] == status, found
    return found


def test_a_student_learns_on_its_own_answers():
    spec = {
        "kind": "distill", "model": server.model, "suffix": "own", "seed": 1,
        "data": {"train": upload(examples(6)).id},
        "distill": {"teacher": server.model, "on_policy": 1, "max_tokens": 8, "divergence": "jsd", "top_k": 16},
        "train": {"max_steps": 2, "batch_size": 2, "max_length": 128, "learning_rate": 1e-4},
    }
    job = job_ended(spec)
    entries = json.loads(server.admin(f"/admin/jobs/{job['id']}/events?stream=false"))["data"]
    steps = [entry for entry in entries if entry["type"] == "step"]
    assert len(steps) == 2, entries
    for step in steps:
        # The student begins as its own teacher; the engine and the trainer round differently.
        assert 0 <= step["divergence"] < 0.01 and 1 <= step["completion_length"] <= 8, step
    name = next(made["name"] for made in job["artifacts"] if made["type"] == "adapter")
    assert ask(name).choices[0].message.content
    for block, more, why in [
        ({"on_policy": 2}, {}, "distill.on_policy"),
        ({"layers": 10}, {}, "distill.on_policy"),
        ({"max_tokens": 128}, {}, "distill.max_tokens"),
        ({}, {"adapter": None}, "student's adapter"),
    ]:
        message = raises_admin({**spec, "distill": {**spec["distill"], **block}, **more})
        assert why in message, message
    # Plain texts have no prompt that could be answered.
    text = {**spec, "data": {"train": upload([{"text": "Once upon a time."}] * 4).id}}
    assert "no prompt" in job_ended(text, "failed")["error"]["message"]


def refusal(path, body):
    try:
        server.admin(path, body)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]
    raise AssertionError(f"{path} accepts {body}")


def test_a_model_is_quantized_evaluated_and_served():
    # The default model is quantized already.
    path = f"/admin/models/{server.model}/quantize"
    status, error = refusal(path, {"type": "Q8_0"})
    assert (status, error["param"]) == (400, "model") and "requantize" in error["message"], error
    for body, word in [({}, "type"), ({"type": "Q9"}, "Q4_K_M"), ({"type": "Q8_0", "x": 1}, "x")]:
        status, error = refusal(path, body)
        assert status == 400 and word in error["message"], error
    assert refusal("/admin/models/none/quantize", {"type": "Q8_0"})[0] == 404
    assert refusal(f"/admin/models/{server.model}/bake", {"type": "Q8_0"})[0] == 404
    settings = {"type": "IQ2_XXS", "requantize": True, "name": "tiny"}
    failed = job_ended(settings, "failed", path)
    assert "imatrix" in failed["error"]["message"], failed
    with Traffic() as traffic:
        made = job_ended({"type": "Q8_0", "requantize": True, "name": "eight"}, path=path)
        assert traffic.answers, "nobody asked"
    assert not traffic.failures, traffic.failures
    assert made["kind"] == "quantize" and made["progress"]["done"] == made["progress"]["total"], made
    model = next(artifact for artifact in made["artifacts"] if artifact["type"] == "model")
    assert model["name"] == "eight" and model["bytes"] > 100 << 20, model
    status, error = refusal(path, {"type": "Q8_0", "requantize": True, "name": "eight"})
    assert (status, error["param"]) == (400, "name"), error

    text = "The quick brown fox jumps over the lazy dog. " * 60
    text = client.files.create(file=("text.txt", text.encode()), purpose="fine-tune")
    task = upload([{"prompt": "The sky is", "choices": ["blue", "made of cheese"], "answer": 0}])
    evaluate = {
        "models": ["eight"],
        "reference": server.model,
        "text": text.id,
        "context": 128,
        "chunks": 2,
        "tasks": [{"name": "sky", "file": task.id}],
        "max_kl": 0.01,
        "min_accuracy": {"sky": 1},
    }
    found = job_ended({"kind": "evaluate", "evaluate": evaluate})
    reports = [artifact for artifact in found["artifacts"] if artifact["type"] == "report"]
    assert [report["name"] for report in reports] == ["report.json", "report.html"], reports
    content = server.admin(f"/admin/jobs/{found['id']}/artifacts/{reports[0]['id']}")
    divergence = json.loads(content)["report"]["models"][0]["divergence"]
    assert 0 <= divergence["mean_kl"]["value"] < 0.01, divergence
    page = server.admin(f"/admin/jobs/{found['id']}/report").decode()
    assert "eight" in page and "<svg" in page
    missed = {**evaluate, "max_kl": None, "max_perplexity": 1}
    missed = job_ended({"kind": "evaluate", "evaluate": missed}, "failed")
    assert missed["error"]["code"] == "gate_missed" and len(missed["artifacts"]) == 2, missed
    for change, param in [
        ({"models": ["none"]}, "evaluate.models"),
        ({"text": "file-none"}, "evaluate.text"),
        ({"reference": None}, "evaluate.max_kl"),
    ]:
        _, error = refusal("/admin/jobs", {"kind": "evaluate", "evaluate": {**evaluate, **change}})
        assert error["param"] == param, error

    server.admin("/admin/models", {"model": "eight"})
    answers = [ask(model).choices[0].message.content for model in ("eight", server.model)]
    assert all(answers), answers
    server.admin("/admin/models/eight", method="DELETE")


def test_a_name_is_published_and_goes_back():
    global server, client

    def publish(model, **more):
        body = {"name": "assistant", "model": model, **more}
        return json.loads(server.admin("/admin/published", body))

    def served_by(count, **more):
        """The models that served requests, from the counters."""
        def counters():
            with urllib.request.urlopen(server.url + "/metrics") as answer:
                lines = answer.read().decode().splitlines()
            found = [line for line in lines if line.startswith("ingot_published_requests_total{")]
            return {line.split('model="')[1].split('"')[0]: int(line.split()[-1]) for line in found}

        before = counters()
        for number in range(count):
            found = ask("assistant", max_tokens=1, **{"user": f"user-{number}", **more})
            assert found.model == "assistant", found
        return {name: value - before.get(name, 0) for name, value in counters().items()}

    adapter = whole["model"]
    assert refusal("/admin/published", {"name": server.model, "model": adapter})[0] == 409
    assert refusal("/admin/published", {"name": "assistant", "model": "none"})[0] == 404
    status, error = refusal("/admin/published", {"name": "x", "model": adapter, "share": 0.5})
    assert (status, error["param"]) == (400, "share"), error
    now = publish(server.model)
    assert (now["model"], now["previous"], now["share"]) == (server.model, None, None), now
    assert "assistant" in [model.id for model in client.models.list()]
    assert served_by(3) == {server.model: 3}
    status, error = refusal("/admin/published", {"name": "assistant", "model": server.model, "share": 0.5})
    assert (status, error["param"]) == (400, "share"), error
    assert publish(adapter, share=0.5)["candidate"] == adapter
    served = served_by(24)
    assert sum(served.values()) == 24 and min(served.values()) >= 4, served
    # The same users get the same models again.
    assert served_by(24) == served
    assert sorted(served_by(6, user="user-1").values()) == [0, 6]
    with Traffic() as traffic:
        assert publish(adapter)["previous"] == server.model
        assert served_by(3) == {server.model: 0, adapter: 3}
    assert not traffic.failures, traffic.failures
    for path in [f"/admin/adapters/{adapter}", f"/admin/models/{server.model}"]:
        try:
            server.admin(path, method="DELETE")
            raise AssertionError(path)
        except urllib.error.HTTPError as error:
            assert error.code == 409, error
    server.kill()
    server = Server()
    client = server.client()
    assert served_by(2) == {adapter: 2}
    said = command("rollback", "assistant")
    assert server.model in said and adapter in said, said
    assert command("publish") == said
    assert served_by(2) == {adapter: 0, server.model: 2}
    evaluation = job_ended({"kind": "evaluate", "evaluate": gate(server.model, 1)}, "failed")
    asked = {"name": "assistant", "model": server.model, "evaluation": evaluation["id"]}
    status, error = refusal("/admin/published", asked)
    assert (status, error["code"]) == (409, "evaluation_not_passed"), error
    evaluation = job_ended({"kind": "evaluate", "evaluate": gate(server.model, 1e6)})
    status, error = refusal("/admin/published", {**asked, "model": adapter})
    assert status == 409, error
    publish(server.model, evaluation=evaluation["id"])
    server.admin("/admin/published/assistant", method="DELETE")
    raises(openai.NotFoundError, lambda: ask("assistant"))


def command(*arguments):
    """What the command line prints, asking the server."""
    line = [os.environ["INGOT_BIN"], *arguments, "--url", server.url, "--admin-key", ADMIN]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def test_what_was_made_is_exported():
    adapter = whole["model"]

    def export(format, *more, name=adapter):
        folder = os.path.join(tempfile.mkdtemp(dir=DATA), "made")
        line = [os.environ["INGOT_BIN"], "export", name, folder, "--data-dir", DATA]
        subprocess.run([*line, "--format", format, *more], check=True, capture_output=True, text=True)
        with open(os.path.join(folder, "README.md")) as card:
            return folder, sorted(os.listdir(folder)), card.read()

    folder, files, card = export("peft")
    assert files == ["README.md", "adapter_config.json", "adapter_model.safetensors"], files
    job = next(job for job in client.fine_tuning.jobs.list() if job.fine_tuned_model == adapter)
    peft = "artifacts/peft/adapter_model.safetensors"
    with open(os.path.join(folder, files[2]), "rb") as made, open(f"{DATA}/jobs/{job.id}/{peft}", "rb") as kept:
        assert made.read() == kept.read()
    for part in [f'base_model: "{server.model}"', "library_name: peft", job.id, '"kind": "sft"', "24 examples"]:
        assert part in card, (part, card)
    folder, files, card = export("gguf", "--type", "Q8_0")
    [model] = [file for file in files if file.endswith("-Q8_0.gguf")]
    assert len(files) == 2 and "stored as Q8_0" in card, (files, card)
    # The merged model answers as the adapter does.
    def answer(name):
        return ask(name, max_tokens=8).choices[0].message.content

    with_adapter = answer(adapter)
    line = [os.environ["INGOT_BIN"], "run", os.path.join(folder, model), "Name a colour, number 3."]
    line += ["--max-tokens", "8", "--temperature", "0", "--data-dir", DATA]
    said = subprocess.run(line, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.split()[:3] == with_adapter.split()[:3], (said.stdout, with_adapter)
    _, files, _ = export("hugging-face")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files), files
    for wrong in [("peft", server.model), ("gguf", "none")]:
        line = [os.environ["INGOT_BIN"], "export", wrong[1], os.path.join(DATA, "no"), "--format", wrong[0]]
        refused = subprocess.run([*line, "--data-dir", DATA], capture_output=True, text=True)
        assert refused.returncode == 1 and not os.path.exists(os.path.join(DATA, "no")), refused


def gate(model, most):
    """An evaluation that fails if the perplexity is above a bound."""
    text = client.files.create(file=("t.txt", b"The sky is blue. " * 80), purpose="fine-tune")
    return {"models": [model], "text": text.id, "context": 64, "chunks": 2, "max_perplexity": most}


def test_a_killed_gateway_loses_nothing():
    global server, client
    job = create(whole["two"], epochs=2, suffix="gale")
    step_of(job, 3)
    server.kill()
    until(lambda: None if processes(job) else True, "the job leaves with its gateway")
    server = Server()
    client = server.client()
    found = ended(job)
    assert any("restarted" in message for message in messages(job)), messages(job)
    assert adapter_digest(job) == whole["digest"]
    ask(found.fine_tuned_model)


def test_a_job_leaves_before_memory_runs_out():
    global server, client
    stop(server.process)
    server = Server("--job-memory-reserve", "1TiB")
    client = server.client()
    job = create(whole["two"], epochs=2, suffix="flood")

    def paused():
        found = server.job(job.id)
        return found if found["status"] == "paused" else None

    error = until(paused, "the job is paused")["error"]
    assert error["code"] == "insufficient_memory" and "available" in error["message"], error
    until(lambda: None if processes(job) else True, "the process leaves")
    stop(server.process)
    server = Server()
    client = server.client()
    client.fine_tuning.jobs.resume(job.id)
    ended(job)
    assert adapter_digest(job) == whole["digest"]


def finish():
    stop(server.process)
    shutil.rmtree(DATA, ignore_errors=True)


if __name__ == "__main__":
    run(globals(), finish, ON_BOTH_RUNNERS if os.environ.get("INGOT_RUNNER") == "llama-cpp" else None)
