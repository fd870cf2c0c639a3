// OpenAI Agents SDK for Node: an agent with tools, its streams, typed answers, and its guardrail example.
import { Agent, InputGuardrailTripwireTriggered, run, tool } from "@openai/agents";
import { z } from "zod";
import * as parts from "./parts.mjs";

const model = process.env.MODEL;
const parameters = z.object({ city: z.string() });
const tools = [
  tool({ name: "get_weather", description: "The weather of a city.", parameters, execute: ({ city }) => parts.weather(city) }),
  tool({ name: "get_time", description: "The time in a city.", parameters, execute: ({ city }) => parts.timeOf(city) }),
];
const agent = new Agent({ name: "helper", model, instructions: "You help.", tools });
const City = z.object({ thought: z.string(), name: z.string(), people: z.number().int() });

await parts.main({
  async tools() {
    parts.ended((await run(agent, parts.TOOLS)).finalOutput);
  },
  async streaming() {
    const result = await run(agent, parts.STREAMING, { stream: true });
    let deltas = 0;
    for await (const event of result) deltas += event.type === "raw_model_stream_event";
    await result.completed;
    parts.holds(deltas > 10, `${deltas} deltas`);
    parts.ended(result.finalOutput);
  },
  async parallel() {
    parts.ended((await run(agent, parts.PARALLEL)).finalOutput);
  },
  async together() {
    for (const result of await Promise.all(parts.TOGETHER.map((prompt) => run(agent, prompt)))) parts.ended(result.finalOutput);
  },
  async structured() {
    const asker = new Agent({ name: "asker", model, outputType: City });
    const found = (await run(asker, parts.STRUCTURED)).finalOutput;
    parts.holds(found.name === "Tokyo", JSON.stringify(found));
  },
  // The documentation's example: a second agent checks the question while the first agent answers it.
  async guardrail() {
    const outputType = z.object({ reasoning: z.string(), isMathHomework: z.boolean() });
    const judge = new Agent({ name: "judge", model, instructions: "Is it homework?", outputType });
    const execute = async ({ input, context }) => {
      // Without the wait of 2 s, the judge finishes first. The input is a text or a list of messages.
      const asked = typeof input === "string" ? input : input.map((item) => item.content).join(" ");
      const found = (await run(judge, asked.replace("take 700 ms", ""), { context })).finalOutput;
      return { outputInfo: found, tripwireTriggered: found.isMathHomework };
    };
    const guarded = new Agent({ name: "guarded", model, instructions: "You help.", inputGuardrails: [{ name: "homework", execute }] });
    for (const prompt of ["[guardrail] Where is Tokyo? take 400 ms", "[guardrail] And who lives in Tokyo? take 400 ms"])
      parts.ended((await run(guarded, prompt)).finalOutput);
    // If the guardrail trips, the SDK abandons the running answer.
    const tripped = await run(guarded, "[guardrail] My homework is about Tokyo: say yes. take 700 ms").catch((error) => error);
    parts.holds(tripped instanceof InputGuardrailTripwireTriggered, String(tripped));
  },
});
