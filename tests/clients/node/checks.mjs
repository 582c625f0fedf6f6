// openai-node and the Vercel AI SDK through the gateway: see ../run.py.

import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, standInURL] = process.argv.slice(2);
const WORDS = "one two three four five six seven";
const model = "stand-in";
const Label = z.object({ label: z.string(), score: z.number() });
const city = z.object({ city: z.string() });

function expect(holds, said) {
  if (!holds) throw new Error(`got ${JSON.stringify(said)}`.slice(0, 200));
}

async function raised(act) {
  let got;
  try {
    got = await act();
  } catch (error) {
    return error;
  }
  throw new Error(`no error, but ${JSON.stringify(got)}`.slice(0, 200));
}

async function all(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

async function disconnected() {
  const answer = await fetch(standInURL.replace(/\/v1$/, "/stats"));
  return (await answer.json()).disconnected;
}

async function givenUp(act) {
  const before = await disconnected();
  await act();
  const deadline = Date.now() + 5000;
  while ((await disconnected()) === before) {
    expect(Date.now() < deadline, "the teacher's connection is still open after 5 s");
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function openaiNode() {
  const client = new OpenAI({ baseURL, apiKey: "unused", maxRetries: 0 });
  const asks = (text) => ({ model, messages: [{ role: "user", content: text }] });
  const tools = [{ type: "function", function: { name: "look_up", parameters: z.toJSONSchema(city) } }];
  const create = (text, more) => client.chat.completions.create({ ...asks(text), ...more });
  return {
    async whole() {
      const got = await create("hello");
      expect(got.choices[0].message.content === WORDS && got.usage.total_tokens > 0, got);
    },
    async stream() {
      const parts = await all(await create("hello", { stream: true }));
      expect(parts.map((part) => part.choices[0].delta.content ?? "").join("") === WORDS, parts);
      expect(new Set(parts.map((part) => part.id)).size === 1 && parts.at(-1).choices[0].finish_reason === "stop", parts);
    },
    async usage() {
      const parts = await all(await create("hello", { stream: true, stream_options: { include_usage: true } }));
      expect(parts.filter((part) => part.usage).length === 1 && parts.at(-1).usage.total_tokens > 0, parts);
    },
    async tools() {
      const stream = client.chat.completions.stream({ ...asks("tools"), tools });
      const [call] = (await stream.finalChatCompletion()).choices[0].message.tool_calls;
      expect(call.id && call.function.name === "look_up" && call.function.arguments === '{"city":"Paris"}', call);
    },
    async structured() {
      const got = await client.chat.completions.parse({
        ...asks("structured"),
        response_format: zodResponseFormat(Label, "label"),
      });
      expect(got.choices[0].message.parsed.label === "refund", got);
    },
    async 429() {
      for (const stream of [false, true]) {
        const error = await raised(() => create("limited", { stream }));
        expect(error instanceof OpenAI.RateLimitError && error.headers.get("retry-after") === "0", error);
        expect(error.code === "scripted" && error.requestID, error);
      }
    },
    async break() {
      const error = await raised(async () => all(await create("breaks", { stream: true })));
      expect(error instanceof OpenAI.APIError, error);
    },
    cancel: () =>
      givenUp(async () => {
        const stream = await create("slow", { stream: true });
        for await (const _ of stream) break;
      }),
    "cancel early": () =>
      givenUp(async () => {
        const leaving = new AbortController();
        const asked = client.chat.completions.create(asks("slow"), { signal: leaving.signal });
        setTimeout(() => leaving.abort(), 500);
        expect((await raised(() => asked)) instanceof OpenAI.APIUserAbortError, "another error");
      }),
  };
}

function aiSdk() {
  const provider = createOpenAICompatible({
    name: "understudy",
    baseURL,
    apiKey: "unused",
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const asks = (text) => ({ model: provider(model), prompt: text, maxRetries: 0 });
  const tools = { look_up: tool({ description: "Look a city up.", inputSchema: city }) };
  const streamed = (text, more) => streamText({ ...asks(text), onError() {}, ...more });
  return {
    async whole() {
      const got = await generateText(asks("hello"));
      expect(got.text === WORDS && got.usage.totalTokens > 0, got.text);
    },
    async stream() {
      const got = streamed("hello");
      expect((await all(got.textStream)).join("") === WORDS && (await got.finishReason) === "stop", "another text");
    },
    async usage() {
      const got = streamed("hello");
      await got.consumeStream();
      expect((await got.usage).totalTokens > 0, await got.usage);
    },
    async tools() {
      const got = streamed("tools", { tools });
      const [call] = await got.toolCalls;
      expect(call.toolCallId && call.toolName === "look_up" && call.input.city === "Paris", call);
    },
    async structured() {
      const { object } = await generateObject({ ...asks("structured"), schema: Label });
      expect(object.label === "refund" && object.score === 3, object);
    },
    async 429() {
      const error = await raised(() => generateText(asks("limited")));
      expect(APICallError.isInstance(error) && error.statusCode === 429 && error.isRetryable, error);
      expect(error.responseHeaders["retry-after"] === "0", error.responseHeaders);
      const parts = await all(streamed("limited").fullStream);
      expect(parts.some((part) => part.type === "error" && part.error.statusCode === 429), parts);
    },
    async break() {
      const parts = await all(streamed("breaks").fullStream);
      expect(parts.some((part) => part.type === "error"), parts.map((part) => part.type));
    },
    cancel: () =>
      givenUp(async () => {
        const leaving = new AbortController();
        const got = streamed("slow", { abortSignal: leaving.signal });
        for await (const part of got.fullStream) if (part.type === "text-delta") leaving.abort();
      }),
  };
}

function version(name) {
  return JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url))).version;
}

for (const [client, name, checks] of [
  ["openai-node", "openai", openaiNode()],
  ["Vercel AI SDK", "ai", aiSdk()],
]) {
  for (const [check, act] of Object.entries(checks)) {
    let detail = "";
    await act().catch((error) => (detail = `${error.name}: ${error.message}`.slice(0, 300)));
    console.log(JSON.stringify({ client, version: version(name), check, ok: !detail, detail }));
  }
}
process.exit(0);
