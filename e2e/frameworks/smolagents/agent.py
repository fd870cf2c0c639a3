"""smolagents: an agent that calls tools, its streams, and answers in a schema from its model class."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import parts
from smolagents import OpenAIModel, ToolCallingAgent, tool

model = OpenAIModel(model_id=os.environ["MODEL"], api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
SCHEMA = {
    "type": "object",
    "properties": {"thought": {"type": "string"}, "name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["thought", "name", "people"],
    "additionalProperties": False,
}


@tool
def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: which
    """
    return parts.weather(city)


@tool
def get_time(city: str) -> str:
    """The time in a city.

    Args:
        city: which
    """
    return parts.time_of(city)


def agent(**more):
    return ToolCallingAgent(tools=[get_weather, get_time], model=model, max_steps=6, **more)


@parts.part
def tools():
    assert agent().run(parts.TOOLS)


@parts.part
def streaming():
    deltas = list(agent(stream_outputs=True).run(parts.STREAMING, stream=True))
    assert len(deltas) > 5, deltas


@parts.part
def parallel():
    assert agent().run(parts.PARALLEL)


@parts.part
def together():
    with ThreadPoolExecutor() as pool:
        assert all(pool.map(lambda prompt: agent().run(prompt), parts.TOGETHER))


@parts.part
def structured():
    shape = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}
    reply = model.generate([{"role": "user", "content": parts.STRUCTURED}], response_format=shape)
    assert json.loads(reply.content)["name"] == "Tokyo", reply.content


parts.main()
