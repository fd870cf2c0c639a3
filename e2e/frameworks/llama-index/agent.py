"""LlamaIndex: a function agent, its streams, and typed answers."""

import asyncio
import os

import parts
import pydantic
from llama_index.core.agent.workflow import AgentStream, FunctionAgent
from llama_index.llms.openai import OpenAI

llm = OpenAI(model=os.environ["MODEL"], api_base=os.environ["OPENAI_BASE_URL"])


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
    return FunctionAgent(tools=[get_weather, get_time], llm=llm, system_prompt="You help.")


@parts.part
async def tools():
    parts.ended(await agent().run(user_msg=parts.TOOLS))


@parts.part
async def streaming():
    run = agent().run(user_msg=parts.STREAMING)
    texts = [event.delta async for event in run.stream_events() if isinstance(event, AgentStream) and event.delta]
    assert len(texts) > 5, texts
    parts.ended(await run)


@parts.part
async def parallel():
    parts.ended(await agent().run(user_msg=parts.PARALLEL))


@parts.part
async def together():
    for result in await asyncio.gather(*(agent().run(user_msg=prompt) for prompt in parts.TOGETHER)):
        parts.ended(result)


@parts.part
async def structured():
    found = (await llm.as_structured_llm(City).acomplete(parts.STRUCTURED)).raw
    assert found.name == "Tokyo", found


parts.main()
