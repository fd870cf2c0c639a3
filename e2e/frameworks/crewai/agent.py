"""CrewAI: a crew of one agent with tools, streams of its model, and typed answers."""

import os
from concurrent.futures import ThreadPoolExecutor

import parts
import pydantic
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool


@tool("get_weather")
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@tool("get_time")
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


def crew(prompt, stream=False, tools=(), **more):
    llm = LLM(model=os.environ["MODEL"], stream=stream)
    agent = Agent(role="helper", goal="To help", backstory="You help.", tools=list(tools), llm=llm)
    return Crew(agents=[agent], tasks=[Task(description=prompt, expected_output="An answer", agent=agent, **more)])


@parts.part
def tools():
    parts.ended(crew(parts.TOOLS, tools=[get_weather]).kickoff().raw)


@parts.part
def streaming():
    parts.ended(crew(parts.STREAMING, stream=True, tools=[get_weather]).kickoff().raw)


@parts.part
def parallel():
    parts.ended(crew(parts.PARALLEL, tools=[get_weather, get_time]).kickoff().raw)


@parts.part
def together():
    with ThreadPoolExecutor() as pool:
        for result in pool.map(lambda prompt: crew(prompt).kickoff(), parts.TOGETHER):
            parts.ended(result.raw)


@parts.part
def structured():
    found = crew(parts.STRUCTURED, output_pydantic=City).kickoff().pydantic
    assert isinstance(found, City), found


parts.main()
