// The official client for JavaScript against the servers that run.sh started.

import assert from "node:assert/strict";
import { before, test } from "node:test";

import OpenAI from "openai";

const env = (name) => {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set; start this suite with tests/sdk/run.sh`);
  return value;
};

const client = new OpenAI({ baseURL: env("TOKENMILL_BASE_URL"), apiKey: "unused", maxRetries: 0 });
const STORY = [{ role: "user", content: "Tell me a story about a sheep in the meadow." }];
const SHORT = [{ role: "user", content: "What is the capital of France?" }];
const WEATHER = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string" } },
      required: ["city"],
    },
  },
};
const QUESTION = [{ role: "user", content: "What is the weather in Paris?" }];

let model;

before(async () => {
  model = (await client.models.list()).data[0].id;
});

const chat = (messages, options = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, ...options });

const contentOf = (completion) => completion.choices[0].message.content;

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const joined = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");

test("an answer ends by itself and counts its tokens", async () => {
  const completion = await chat(SHORT);
  assert.ok(contentOf(completion).length > 0);
  assert.equal(completion.choices[0].finish_reason, "stop");
  assert.equal(
    completion.usage.total_tokens,
    completion.usage.prompt_tokens + completion.usage.completion_tokens,
  );
});

test("a stream adds up to the whole answer and ends with its usage", async () => {
  const whole = await chat(STORY, { max_tokens: 40 });
  const chunks = await collect(
    await chat(STORY, { max_tokens: 40, stream: true, stream_options: { include_usage: true } }),
  );
  assert.deepEqual(chunks[0].choices[0].delta, { role: "assistant", content: "" });
  assert.equal(joined(chunks), contentOf(whole));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
  assert.equal(chunks.at(-2).choices[0].finish_reason, whole.choices[0].finish_reason);
});

test("the stream helper accumulates the message", async () => {
  const runner = client.chat.completions.stream({
    model,
    messages: STORY,
    temperature: 0,
    max_tokens: 20,
  });
  const deltas = [];
  runner.on("content", (delta) => deltas.push(delta));
  const final = await runner.finalChatCompletion();
  assert.equal(contentOf(final), contentOf(await chat(STORY, { max_tokens: 20 })));
  assert.equal(deltas.join(""), contentOf(final));
});

test("a stop string ends the answer", async () => {
  const whole = contentOf(await chat(STORY, { max_tokens: 40 }));
  const stop = whole.slice(20, 25);
  const completion = await chat(STORY, { max_tokens: 40, stop });
  assert.equal(contentOf(completion), whole.slice(0, whole.indexOf(stop)));
  assert.equal(completion.choices[0].finish_reason, "stop");
});

test("log-probabilities come with their bytes", async () => {
  const completion = await chat(STORY, { max_tokens: 4, logprobs: true, top_logprobs: 2 });
  const entries = completion.choices[0].logprobs.content;
  assert.equal(entries.length, 4);
  const bytes = Buffer.from(entries.flatMap((entry) => entry.bytes));
  assert.equal(bytes.toString("utf8"), contentOf(completion));
  for (const entry of entries) assert.equal(entry.top_logprobs.length, 2);
});

test("a tool is called, and its result is answered", async () => {
  const first = await chat(QUESTION, { tools: [WEATHER] });
  assert.equal(first.choices[0].finish_reason, "tool_calls");
  const [call] = first.choices[0].message.tool_calls;
  assert.equal(call.function.name, "get_weather");
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  const result = { role: "tool", tool_call_id: call.id, content: "sunny, 21 degrees" };
  const second = await chat([...QUESTION, first.choices[0].message, result], { tools: [WEATHER] });
  assert.ok(contentOf(second).length > 0);
  assert.ok(second.usage.prompt_tokens > first.usage.total_tokens);
});

test("a streamed call is put together by the helper", async () => {
  const runner = client.chat.completions.stream({
    model,
    messages: QUESTION,
    temperature: 0,
    tools: [WEATHER],
  });
  const final = await runner.finalChatCompletion();
  const [call] = final.choices[0].message.tool_calls;
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["city"]);
  assert.equal(final.choices[0].finish_reason, "tool_calls");
});

test("text completions take several prompts", async () => {
  const prompt = ["Once upon a time", "The end"];
  const options = { model, temperature: 0, max_tokens: 6 };
  const both = await client.completions.create({ ...options, prompt });
  assert.deepEqual(
    both.choices.map((choice) => choice.index),
    [0, 1],
  );
  for (const [index, single] of prompt.entries()) {
    const solo = await client.completions.create({ ...options, prompt: single });
    assert.equal(solo.choices[0].text, both.choices[index].text);
  }
});

test("models are listed and found", async () => {
  const card = await client.models.retrieve(model);
  assert.equal(card.id, model);
  await assert.rejects(client.models.retrieve("no-such-model"), OpenAI.NotFoundError);
});

test("refusals are the client's own errors", async () => {
  await assert.rejects(chat(STORY, { model: "no-such-model" }), OpenAI.NotFoundError);
  await assert.rejects(chat(STORY, { temperature: -1 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const stranger = new OpenAI({
    baseURL: env("TOKENMILL_GUARDED_URL"),
    apiKey: "wrong",
    maxRetries: 0,
  });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

test("an aborted stream ends early and leaves the server well", async () => {
  const before = contentOf(await chat(SHORT));
  const stream = await chat(STORY, { max_tokens: 1200, stream: true, ignore_eos: true });
  let count = 0;
  for await (const _chunk of stream) {
    count += 1;
    if (count === 5) stream.controller.abort();
  }
  // What had arrived by then is still delivered, but the rest never comes.
  assert.ok(count >= 5 && count < 1200, `${count} chunks`);
  assert.equal(contentOf(await chat(SHORT)), before);
});

test("concurrent streams equal their solo answers", async () => {
  const words = ["sheep", "baker", "ant", "duck", "lion", "fox", "king", "farmer"];
  const prompts = Array.from({ length: 16 }, (_, i) => [
    { role: "user", content: `Tell me a story about a ${words[i % 8]} and number ${i >> 3}.` },
  ]);
  const solo = [];
  for (const prompt of prompts) solo.push(contentOf(await chat(prompt, { max_tokens: 20 })));
  const together = await Promise.all(
    prompts.map(async (prompt) =>
      joined(await collect(await chat(prompt, { max_tokens: 20, stream: true }))),
    ),
  );
  assert.deepEqual(together, solo);
});
