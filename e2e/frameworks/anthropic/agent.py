"""Anthropic's SDK: the tool runner, streams, and parsed output."""

import asyncio
import os

import parts
import pydantic
from anthropic import Anthropic, AsyncAnthropic, beta_tool

MODEL = os.environ["MODEL"]
client = Anthropic()


@beta_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@beta_tool
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


def said(message):
    parts.ended("".join(block.text for block in message.content if block.type == "text"))


def ask(prompt):
    return {"model": MODEL, "max_tokens": 1024, "tools": [get_weather, get_time], "messages": [{"role": "user", "content": prompt}]}


@parts.part
def tools():
    said(client.beta.messages.tool_runner(**ask(parts.TOOLS)).until_done())


@parts.part
def streaming():
    seen, message = 0, None
    for stream in client.beta.messages.tool_runner(**ask(parts.STREAMING), stream=True):
        seen += sum(1 for _ in stream)
        message = stream.get_final_message()
    assert seen > 10, seen
    said(message)


@parts.part
def parallel():
    said(client.beta.messages.tool_runner(**ask(parts.PARALLEL)).until_done())


@parts.part
async def together():
    many = AsyncAnthropic()
    calls = [many.messages.create(model=MODEL, max_tokens=1024, messages=[{"role": "user", "content": one}]) for one in parts.TOGETHER]
    for message in await asyncio.gather(*calls):
        said(message)


@parts.part
def structured():
    question = [{"role": "user", "content": parts.STRUCTURED}]
    found = client.messages.parse(model=MODEL, max_tokens=1024, messages=question, output_format=City).parsed_output
    assert found.name == "Tokyo", found


parts.main()
