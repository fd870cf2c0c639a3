// Vercel's AI SDK: generateText and streamText with tools, and typed answers, with both providers.
import { anthropic } from "@ai-sdk/anthropic";
import { openai } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import * as parts from "./parts.mjs";

const models = [openai(process.env.MODEL), anthropic(process.env.MODEL_OF_ANTHROPIC)];
const inputSchema = z.object({ city: z.string() });
const tools = {
  get_weather: tool({ description: "The weather of a city.", inputSchema, execute: async ({ city }) => parts.weather(city) }),
  get_time: tool({ description: "The time in a city.", inputSchema, execute: async ({ city }) => parts.timeOf(city) }),
};
const City = z.object({ thought: z.string(), name: z.string(), people: z.number().int() });
// By default, the SDK lets OpenAI store the conversation, and refers to stored items. Belay cannot know the size of these items.
const providerOptions = { openai: { store: false } };
const ask = (model, prompt) => ({ model, prompt, tools, stopWhen: stepCountIs(5), maxRetries: 0, providerOptions });

await parts.main({
  async tools() {
    for (const model of models) parts.ended((await generateText(ask(model, parts.TOOLS))).text);
  },
  async streaming() {
    for (const model of models) {
      const texts = [];
      for await (const text of streamText(ask(model, parts.STREAMING)).textStream) texts.push(text);
      parts.holds(texts.length > 5, texts.join("|"));
      parts.ended(texts.join(""));
    }
  },
  async parallel() {
    for (const model of models) parts.ended((await generateText(ask(model, parts.PARALLEL))).text);
  },
  async together() {
    const all = parts.TOGETHER.map((prompt) => generateText({ model: models[0], prompt, maxRetries: 0 }));
    for (const result of await Promise.all(all)) parts.ended(result.text);
  },
  async structured() {
    for (const model of models) {
      const { output } = await generateText({ model, prompt: parts.STRUCTURED, output: Output.object({ schema: City }), maxRetries: 0 });
      parts.holds(output.name === "Tokyo", JSON.stringify(output));
    }
  },
});
