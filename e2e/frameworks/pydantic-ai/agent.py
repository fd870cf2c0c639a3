"""pydantic-ai: an agent with tools, its streams, and typed output."""

import asyncio
import os

import parts
import pydantic
from pydantic_ai import Agent

MODEL = f"openai-chat:{os.environ['MODEL']}"
agent = Agent(MODEL, instructions="You help.")


@agent.tool_plain
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@agent.tool_plain
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


@parts.part
async def tools():
    parts.ended((await agent.run(parts.TOOLS)).output)


@parts.part
async def streaming():
    async with agent.run_stream(parts.STREAMING) as result:
        texts = [text async for text in result.stream_text(debounce_by=None)]
    # This framework takes the text before the tool calls as the answer, as its documentation says.
    assert texts, texts
    async with Agent(MODEL).run_stream("[streaming] Say hello.") as result:
        texts = [text async for text in result.stream_text(debounce_by=None)]
    assert len(texts) > 5, texts
    parts.ended(texts[-1])


@parts.part
async def parallel():
    parts.ended((await agent.run(parts.PARALLEL)).output)


@parts.part
async def together():
    for result in await asyncio.gather(*(agent.run(prompt) for prompt in parts.TOGETHER)):
        parts.ended(result.output)


@parts.part
async def structured():
    found = (await Agent(MODEL, output_type=City).run(parts.STRUCTURED)).output
    assert found.name == "Tokyo", found


parts.main()
