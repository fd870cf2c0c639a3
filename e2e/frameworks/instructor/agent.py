"""Instructor: typed answers with OpenAI's SDK: whole, partial, and several at once."""

import asyncio
import os

import instructor
import parts
import pydantic

MODEL = f"openai/{os.environ['MODEL']}"
client = instructor.from_provider(MODEL)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


class get_weather(pydantic.BaseModel):
    """The weather of a city."""

    city: str


class get_time(pydantic.BaseModel):
    """The time in a city."""

    city: str


def ask(prompt, kind, **more):
    return {"response_model": kind, "messages": [{"role": "user", "content": prompt}]} | more


@parts.part
def tools():
    found = client.chat.completions.create(**ask(parts.TOOLS, get_weather))
    assert found.city == "Tokyo", found


@parts.part
def streaming():
    partly = list(client.chat.completions.create_partial(**ask(parts.STREAMING, City)))
    assert len(partly) > 3 and partly[-1].name == "Tokyo", partly


@parts.part
def parallel():
    from collections.abc import Iterable

    many = instructor.from_provider(MODEL, mode=instructor.Mode.PARALLEL_TOOLS)
    found = list(many.chat.completions.create(**ask(parts.PARALLEL, Iterable[get_weather | get_time])))
    assert [type(one) for one in found] == [get_weather, get_time], found


@parts.part
async def together():
    many = instructor.from_provider(MODEL, async_client=True)
    calls = [many.chat.completions.create(**ask(prompt, City)) for prompt in parts.TOGETHER]
    assert [one.name for one in await asyncio.gather(*calls)] == ["Tokyo", "Tokyo"]


@parts.part
def structured():
    found = client.chat.completions.create(**ask(parts.STRUCTURED, City))
    assert found.name == "Tokyo", found


parts.main()
