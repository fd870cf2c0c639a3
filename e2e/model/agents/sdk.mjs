// Calls models with the official SDKs of OpenAI and Anthropic for Node, as sdk.py does for Python.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const WORDS = [{ role: "user", content: "write 60 words" }];
const CLAUDE = "claude-sonnet-4-5";
const openai = new OpenAI();
const anthropic = new Anthropic();

async function read(stream, leave) {
  let seen = 0;
  for await (const _ of stream) if (++seen === leave) break;
  return seen;
}
const chat = async (model = "gpt-4o", leave, options) =>
  read(await openai.chat.completions.create({ model, messages: WORDS, stream: true, stream_options: { include_usage: true } }, options), leave);
const responses = async (model = "gpt-4o", leave, options) => read(await openai.responses.create({ model, input: WORDS, stream: true }, options), leave);
const messages = async (model = CLAUDE, leave, options) =>
  read(await anthropic.messages.create({ model, max_tokens: 500, messages: WORDS, stream: true }, options), leave);

function holds(found, what) {
  if (!found) throw new Error(`expected it to be so: ${what}`);
}

// Cancels a call after 300 ms, as a server does when its user closes the page.
async function cancelled(call, model) {
  const controller = new AbortController();
  setTimeout(() => controller.abort(), 300);
  const end = await call(model, undefined, { signal: controller.signal }).then((seen) => seen, () => "aborted");
  holds(end === "aborted" || end < 50, `cut short, found ${end}`);
}

for (let turn = 0; turn < 20; turn++) for (const call of [chat, responses, messages]) holds((await call()) > 50, "a whole stream");
console.log("PART streaming");
await Promise.all([chat, responses, messages].flatMap((call) => Array.from({ length: 8 }, () => call())));
console.log("PART together");
holds((await chat("gpt-4o-fault-503x2")) > 50, "a third try");
holds((await responses("gpt-4o-fault-429x1")) > 50, "a second try");
holds((await messages(`${CLAUDE}-fault-529x2`)) > 50, "a third try");
console.log("PART retried");
for (const [call, model] of [[chat, "gpt-4o"], [responses, "gpt-4o"], [messages, CLAUDE]]) {
  await call(`${model}-fault-pace-5`, 9);
  await cancelled(call, `${model}-fault-pace-20`);
  await cancelled(call, `${model}-fault-slow-2000`);
}
console.log("PART left");
holds((await chat()) > 50, "a whole stream");
console.log("DONE");
process.exit(0);
