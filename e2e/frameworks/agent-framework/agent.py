"""Microsoft Agent Framework: an agent with tools, its streams, and typed answers."""

import asyncio
import os

import parts
import pydantic
from agent_framework.openai import OpenAIChatCompletionClient

client = OpenAIChatCompletionClient(model=os.environ["MODEL"])


def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


def agent():
    return client.as_agent(name="helper", instructions="You help.", tools=[get_weather, get_time])


@parts.part
async def tools():
    parts.ended((await agent().run(parts.TOOLS)).text)


@parts.part
async def streaming():
    texts = [update.text async for update in agent().run(parts.STREAMING, stream=True) if update.text]
    assert len(texts) > 5, texts
    parts.ended("".join(texts))


@parts.part
async def parallel():
    parts.ended((await agent().run(parts.PARALLEL)).text)


@parts.part
async def together():
    for result in await asyncio.gather(*(agent().run(prompt) for prompt in parts.TOGETHER)):
        parts.ended(result.text)


@parts.part
async def structured():
    found = (await client.as_agent(name="asker").run(parts.STRUCTURED, options={"response_format": City})).value
    assert found.name == "Tokyo", found


parts.main()
