"""Google's Agent Development Kit with a model of another provider, through its adapter for LiteLLM."""

import asyncio
import os

import parts
import pydantic
from google.adk.agents import LlmAgent
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.models.lite_llm import LiteLlm
from google.adk.runners import InMemoryRunner
from google.genai import types


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


async def ask(prompt, mode=StreamingMode.NONE, **more):
    agent = LlmAgent(name="helper", model=LiteLlm(model=f"openai/{os.environ['MODEL']}"), instruction="You help.", **more)
    runner = InMemoryRunner(agent=agent, app_name="first")
    session = await runner.session_service.create_session(app_name="first", user_id="me")
    message = types.Content(role="user", parts=[types.Part(text=prompt)])
    events = runner.run_async(user_id="me", session_id=session.id, new_message=message, run_config=RunConfig(streaming_mode=mode))
    return ["".join(part.text or "" for part in event.content.parts or []) async for event in events if event.content]


TOOLS = [get_weather, get_time]


@parts.part
async def tools():
    parts.ended((await ask(parts.TOOLS, tools=TOOLS))[-1])


@parts.part
async def streaming():
    texts = await ask(parts.STREAMING, StreamingMode.SSE, tools=TOOLS)
    assert len(texts) > 5, texts
    parts.ended(texts[-1])


@parts.part
async def parallel():
    parts.ended((await ask(parts.PARALLEL, tools=TOOLS))[-1])


@parts.part
async def together():
    for texts in await asyncio.gather(*(ask(prompt) for prompt in parts.TOGETHER)):
        parts.ended(texts[-1])


@parts.part
async def structured():
    found = City.model_validate_json((await ask(parts.STRUCTURED, output_schema=City))[-1])
    assert found.name == "Tokyo", found


parts.main()
