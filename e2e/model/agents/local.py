"""Calls a self-hosted model with the official SDKs: each API, whole and streamed, several calls at once, and an answer in a schema. Prints
the tokens of each call, as the server reports them, one line a call."""

import asyncio
import json
import os

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

MODEL = os.environ["MODEL"]
openai, anthropic = AsyncOpenAI(max_retries=0), AsyncAnthropic(max_retries=0)
ASK = [{"role": "user", "content": "Say something."}]
# The keys are not in alphabetical order: the reasoning comes before the answer.
VERDICT = {
    "type": "object",
    "properties": {"reasoning": {"type": "string", "maxLength": 8}, "answer": {"type": "boolean"}},
    "required": ["reasoning", "answer"],
    "additionalProperties": False,
}


def cost(usage):
    """Prints the number of all tokens of a call, for any API."""
    if hasattr(usage, "total_tokens"):
        total = usage.total_tokens
    else:
        total = usage.input_tokens + usage.output_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    print(json.dumps({"tokens": total}), flush=True)


async def chat(stream):
    ask = {"model": MODEL, "messages": ASK, "max_completion_tokens": 30}
    if not stream:
        return cost((await openai.chat.completions.create(**ask)).usage)
    last = None
    async for chunk in await openai.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        last = chunk.usage or last
    cost(last)


async def responses(stream):
    ask = {"model": MODEL, "input": ASK, "max_output_tokens": 30}
    if not stream:
        return cost((await openai.responses.create(**ask)).usage)
    async for event in await openai.responses.create(**ask, stream=True):
        if event.type in ("response.completed", "response.incomplete"):
            cost(event.response.usage)


async def messages(stream):
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 30}
    if not stream:
        return cost((await anthropic.messages.create(**ask)).usage)
    async with anthropic.messages.stream(**ask) as said:
        cost((await said.get_final_message()).usage)


async def main():
    for call in (chat, responses, messages):
        for stream in (False, True):
            await call(stream)
            print(f"PART {call.__name__}{' streamed' if stream else ''}", flush=True)
    await asyncio.gather(*(chat(stream) for stream in (False, True) for _ in range(3)))
    print("PART together", flush=True)
    shape = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": VERDICT}}
    reply = await openai.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=200, response_format=shape)
    cost(reply.usage)
    assert list(json.loads(reply.choices[0].message.content)) == ["reasoning", "answer"], reply.choices[0].message.content
    print("PART structured in the schema's order", flush=True)
    print("DONE", flush=True)


asyncio.run(main())
