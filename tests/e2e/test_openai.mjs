// End-to-end tests with the official JavaScript client.
//
//   INGOT_URL=http://127.0.0.1:8000 node tests/e2e/test_openai.mjs [NAME…]
//
// Without INGOT_URL a server is started from INGOT_BIN. INGOT_MODEL is a model's name (default:
// the first one).
// The package `openai` is looked for where Node looks, or in the folder INGOT_NODE_MODULES.
// INGOT_API_KEY is the server's key, where it has one; INGOT_EMBED_MODEL names a model that embeds.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { findOrStart } from "./_server.mjs";

async function load(name) {
  const folder = process.env.INGOT_NODE_MODULES;
  if (!folder) return import(name);
  const require = createRequire(path.join(path.resolve(folder), "..", "package.json"));
  return import(pathToFileURL(require.resolve(name)).href);
}

const module = await load("openai");
const OpenAI = module.OpenAI ?? module.default;
const { url: URL_, model: MODEL, key: KEY } = await findOrStart();
const EMBED_MODEL = process.env.INGOT_EMBED_MODEL;

const options = { baseURL: `${URL_}/v1`, apiKey: KEY ?? "none", timeout: 120_000, maxRetries: 0 };
const client = new OpenAI(options);
const HELLO = [{ role: "user", content: "Say hello to my cat." }];
const ASK = [{ role: "user", content: "What is the weather in Paris?" }];
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city",
    parameters: {
      type: "object",
      properties: {
        city: { type: "string", maxLength: 20 },
        unit: { type: "string", enum: ["c", "f"] },
      },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};

const chat = (more = {}, messages = HELLO) =>
  client.chat.completions.create({ model: MODEL, messages, max_tokens: 16, temperature: 0, ...more });

const complete = (more = {}, prompt = "Once upon a time") =>
  client.completions.create({ model: MODEL, prompt, max_tokens: 8, temperature: 0, ...more });

async function refused(kind, promise, fields = {}) {
  try {
    await promise;
  } catch (error) {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    for (const [name, value] of Object.entries(fields)) assert.equal(error[name], value, error.message);
    return error;
  }
  return assert.fail(`no ${kind.name}`);
}

async function text(stream) {
  let all = "";
  for await (const chunk of stream) {
    for (const choice of chunk.choices) all += choice.delta.content ?? "";
  }
  return all;
}

const tests = {
  async chat() {
    const answer = await chat();
    assert.equal(answer.object, "chat.completion");
    assert.match(answer.id, /^chatcmpl-/);
    assert.equal(answer.choices[0].message.role, "assistant");
    assert.ok(answer.choices[0].message.content.length > 0);
    assert.ok(["stop", "length"].includes(answer.choices[0].finish_reason));
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.equal(prompt_tokens + completion_tokens, total_tokens);
    assert.equal(typeof answer.usage.prompt_tokens_details.cached_tokens, "number");
  },

  async stream() {
    const whole = await chat({ seed: 1 });
    const stream = await chat({ seed: 1, stream: true, stream_options: { include_usage: true } });
    let all = "";
    let last;
    const reasons = [];
    for await (const chunk of stream) {
      last = chunk;
      for (const choice of chunk.choices) {
        all += choice.delta.content ?? "";
        if (choice.finish_reason) reasons.push(choice.finish_reason);
      }
    }
    assert.equal(all, whole.choices[0].message.content);
    assert.deepEqual(reasons, [whole.choices[0].finish_reason]);
    assert.equal(last.usage.completion_tokens, whole.usage.completion_tokens);
  },

  async stream_helper() {
    const stream = client.chat.completions.stream({ model: MODEL, messages: HELLO, max_tokens: 16 });
    let all = "";
    stream.on("content", (delta) => (all += delta));
    const answer = await stream.finalChatCompletion();
    assert.equal(answer.choices[0].message.content, all);
    assert.equal(answer.choices[0].message.role, "assistant");
  },

  async n() {
    const answer = await chat({ n: 3, temperature: 1, seed: 7 });
    assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  },

  async seed() {
    const once = async () =>
      (await chat({ temperature: 1, seed: 42, max_tokens: 24 })).choices[0].message.content;
    assert.equal(await once(), await once());
  },

  async length() {
    const answer = await chat({ max_tokens: 3, ignore_eos: true });
    assert.equal(answer.choices[0].finish_reason, "length");
    assert.equal(answer.usage.completion_tokens, 3);
  },

  async logprobs() {
    const answer = await chat({ logprobs: true, top_logprobs: 2 });
    const tokens = answer.choices[0].logprobs.content;
    assert.ok(tokens.length > 0);
    for (const token of tokens) {
      assert.ok(token.logprob <= 0 && Array.isArray(token.bytes));
      assert.equal(token.top_logprobs.length, 2);
    }
  },

  async stop() {
    // llama.cpp rounds a prompt that is cached and one that is not a little differently: compare
    // cached ones.
    await chat({ max_tokens: 32 });
    const whole = (await chat({ max_tokens: 32 })).choices[0].message.content;
    const stop = whole.slice(whole.length >> 1).slice(0, 3);
    const answer = await chat({ max_tokens: 32, stop: [stop] });
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.ok(!answer.choices[0].message.content.includes(stop));
    assert.ok(!(await text(await chat({ max_tokens: 32, stop, stream: true }))).includes(stop));
  },

  async json_schema() {
    const schema = {
      type: "object",
      properties: { name: { type: "string", maxLength: 12 }, age: { type: "integer", minimum: 0, maximum: 99 } },
      required: ["name", "age"],
      additionalProperties: false,
    };
    const response_format = { type: "json_schema", json_schema: { name: "pet", strict: true, schema } };
    const answer = await chat({ response_format, max_tokens: 120 });
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)).sort(), ["age", "name"]);
    const parsed = await client.chat.completions.parse({
      model: MODEL, messages: HELLO, response_format, max_tokens: 120, temperature: 0,
    });
    assert.equal(typeof parsed.choices[0].message.parsed.age, "number");
    const json = JSON.parse(await text(await chat({ response_format, max_tokens: 120, stream: true })));
    assert.equal(typeof json.name, "string");
  },

  async json_object() {
    const answer = await chat({ response_format: { type: "json_object" }, max_tokens: 200 });
    assert.match(answer.choices[0].message.content, /^\s*\{/);
  },

  async tools() {
    const more = { tools: [WEATHER], max_tokens: 200, parallel_tool_calls: false };
    const choices = ["required", { type: "function", function: { name: "get_weather" } }];
    for (const tool_choice of choices) {
      const answer = await chat({ ...more, tool_choice }, ASK);
      const [call] = answer.choices[0].message.tool_calls;
      assert.equal(call.function.name, "get_weather");
      assert.ok(["c", "f"].includes(JSON.parse(call.function.arguments).unit));
      const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
      const next = await chat({ tools: [WEATHER] }, [...ASK, answer.choices[0].message, result]);
      assert.ok(next.choices[0].message);
    }
    const auto = await chat({ tools: [WEATHER], max_tokens: 60 }, ASK);
    assert.ok(auto.choices[0].message.content || auto.choices[0].message.tool_calls.length);
  },

  async tools_stream() {
    const stream = client.chat.completions.stream({
      model: MODEL, messages: ASK, tools: [WEATHER], tool_choice: "required", max_tokens: 200,
      temperature: 0, parallel_tool_calls: false,
    });
    const answer = await stream.finalChatCompletion();
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    const [call] = answer.choices[0].message.tool_calls;
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "unit"]);
  },

  async completions() {
    const answer = await complete({ echo: true, logprobs: 1, max_tokens: 4 }, "The sky is");
    const { text: all, logprobs } = answer.choices[0];
    assert.ok(all.startsWith("The sky is"));
    assert.equal(logprobs.tokens.length, answer.usage.total_tokens);
    assert.equal(logprobs.token_logprobs[0], null);
    const batch = await complete({ n: 2, temperature: 1 }, ["a", "b"]);
    assert.deepEqual(batch.choices.map((choice) => choice.index), [0, 1, 2, 3]);
    let streamed = "";
    for await (const chunk of await complete({ stream: true })) streamed += chunk.choices[0].text;
    assert.equal(streamed, (await complete()).choices[0].text);
  },

  async embeddings() {
    const model = EMBED_MODEL ?? MODEL;
    let answer;
    try {
      answer = await client.embeddings.create({ model, input: ["a cat", "a dog"] });
    } catch (error) {
      assert.ok(!EMBED_MODEL && error instanceof OpenAI.BadRequestError, error.message);
      assert.equal(error.param, "model");
      return;
    }
    const [one, two] = answer.data.map((item) => item.embedding);
    assert.ok(one.length === two.length && one.length > 1);
    const floats = await client.embeddings.create({ model, input: "a cat", encoding_format: "float" });
    const far = one.map((value, index) => Math.abs(value - floats.data[0].embedding[index]));
    assert.ok(Math.max(...far) < 1e-3);
  },

  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.ok(ids.includes(MODEL));
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
    await refused(OpenAI.NotFoundError, client.models.retrieve("no-such-model"));
  },

  async errors() {
    const bad = [["temperature", "hot"], ["n", 0], ["top_p", 2], ["frobnicate", 1], ["stop", [1, 2]]];
    for (const [name, value] of bad) {
      const error = await refused(OpenAI.BadRequestError, chat({ [name]: value }));
      assert.ok(error.param.startsWith(name) && error.message.includes(name), error.message);
      assert.equal(error.type, "invalid_request_error");
    }
    await refused(OpenAI.NotFoundError, chat({ model: "no-such-model" }), { code: "model_not_found" });
    const long = [{ role: "user", content: "cat ".repeat(200_000) }];
    await refused(OpenAI.BadRequestError, chat({}, long), { code: "context_length_exceeded" });
    if (KEY) {
      const stranger = new OpenAI({ ...options, apiKey: "wrong" });
      await refused(OpenAI.AuthenticationError, stranger.models.list(), { code: "invalid_api_key" });
    }
  },

  async unicode() {
    const response_format = { type: "regex", regex: "[😀-😏]{4}" };
    const all = await text(await chat({ response_format, max_tokens: 40, stream: true }));
    assert.match(all, /^[😀-😏]{4}$/u);
  },

  async concurrent() {
    const one = (number) =>
      chat({ stream: true, max_tokens: 24 }, [{ role: "user", content: `Count to ${number}.` }]).then(text);
    const answers = await Promise.all([...Array(8).keys()].map(one));
    assert.ok(answers.every((answer) => answer.length > 0));
  },

  async cancellation() {
    for (let round = 0; round < 4; round++) {
      const stream = await chat({ stream: true, max_tokens: 2000, ignore_eos: true });
      let count = 0;
      for await (const _ of stream) if (++count === 3) break;
      stream.controller.abort();
    }
    const started = Date.now();
    await chat({ max_tokens: 4 });
    assert.ok(Date.now() - started < 30_000);
  },
};

const names = process.argv.slice(2);
const chosen = Object.entries(tests).filter(([name]) => names.length === 0 || names.includes(name));
let failed = 0;
for (const [name, test] of chosen) {
  const started = Date.now();
  try {
    await test();
    console.log(`ok     ${name} (${((Date.now() - started) / 1000).toFixed(2)} s)`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED ${name}`);
    console.error(error);
  }
}
console.log(`${chosen.length - failed} passed, ${failed} failed`);
process.exit(failed || chosen.length === 0 ? 1 : 0);
