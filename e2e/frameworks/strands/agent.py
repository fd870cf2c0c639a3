"""Strands Agents: an agent with tools (it always streams), and typed answers."""

import asyncio
import os

import parts
import pydantic
from strands import Agent, tool
from strands.models.openai import OpenAIModel

model = OpenAIModel(model_id=os.environ["MODEL"])


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@tool
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    """A city."""

    thought: str
    name: str
    people: int


def agent(**more):
    return Agent(model=model, tools=[get_weather, get_time], callback_handler=None, **more)


@parts.part
def tools():
    parts.ended(agent()(parts.TOOLS))


@parts.part
async def streaming():
    texts = [event["data"] async for event in agent().stream_async(parts.STREAMING) if "data" in event]
    assert len(texts) > 5, texts
    parts.ended("".join(texts))


@parts.part
def parallel():
    parts.ended(agent()(parts.PARALLEL))


@parts.part
async def together():
    for result in await asyncio.gather(*(agent().invoke_async(prompt) for prompt in parts.TOGETHER)):
        parts.ended(result)


@parts.part
def structured():
    found = agent()(parts.STRUCTURED, structured_output_model=City).structured_output
    assert found.name == "Tokyo", found


parts.main()
