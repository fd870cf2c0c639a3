"""Agno: an agent with tools, its streams, and typed answers."""

import asyncio
import os

import parts
import pydantic
from agno.agent import Agent
from agno.models.openai import OpenAIChat


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


def agent(**more):
    return Agent(model=OpenAIChat(id=os.environ["MODEL"]), tools=[get_weather, get_time], **more)


@parts.part
def tools():
    parts.ended(agent().run(parts.TOOLS).content)


@parts.part
def streaming():
    texts = [str(event.content) for event in agent().run(parts.STREAMING, stream=True) if getattr(event, "content", None)]
    assert len(texts) > 5, texts
    parts.ended("".join(texts))


@parts.part
def parallel():
    parts.ended(agent().run(parts.PARALLEL).content)


@parts.part
async def together():
    for result in await asyncio.gather(*(agent().arun(prompt) for prompt in parts.TOGETHER)):
        parts.ended(result.content)


@parts.part
def structured():
    found = Agent(model=OpenAIChat(id=os.environ["MODEL"]), output_schema=City).run(parts.STRUCTURED).content
    assert found.name == "Tokyo", found


parts.main()
