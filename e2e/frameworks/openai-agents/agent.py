"""OpenAI Agents SDK: Agent and Runner, its guardrail example, and its SandboxAgent."""

import asyncio
import os

import parts
import pydantic
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    function_tool,
    input_guardrail,
)
from agents.sandbox import Manifest, SandboxAgent, SandboxRunConfig
from agents.sandbox.capabilities import Filesystem, Shell
from agents.sandbox.sandboxes.unix_local import UnixLocalSandboxClient

MODEL = os.environ["MODEL"]


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@function_tool
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


class Homework(pydantic.BaseModel):
    reasoning: str
    is_math_homework: bool


agent = Agent(name="helper", model=MODEL, instructions="You help.", tools=[get_weather, get_time])


@parts.part
async def tools():
    parts.ended((await Runner.run(agent, parts.TOOLS)).final_output)


@parts.part
async def streaming():
    result = Runner.run_streamed(agent, parts.STREAMING)
    deltas = [event async for event in result.stream_events() if event.type == "raw_response_event"]
    assert len(deltas) > 10, len(deltas)
    parts.ended(result.final_output)


@parts.part
async def parallel():
    parts.ended((await Runner.run(agent, parts.PARALLEL)).final_output)


@parts.part
async def together():
    for result in await asyncio.gather(*(Runner.run(agent, prompt) for prompt in parts.TOGETHER)):
        parts.ended(result.final_output)


@parts.part
async def structured():
    asker = Agent(name="asker", model=MODEL, output_type=City)
    found = (await Runner.run(asker, parts.STRUCTURED)).final_output
    assert isinstance(found, City) and found.name == "Tokyo", found


@parts.part
async def guardrail():
    """The documentation's example: a second agent checks the question while the first agent answers it."""
    judge = Agent(name="judge", model=MODEL, instructions="Is it homework?", output_type=Homework)

    @input_guardrail
    async def no_homework(context, agent, question):
        # Without the wait of 2 s, the judge finishes first.
        found = (await Runner.run(judge, question.replace("take 700 ms", ""), context=context.context)).final_output
        return GuardrailFunctionOutput(output_info=found, tripwire_triggered=found.is_math_homework)

    guarded = Agent(name="guarded", model=MODEL, instructions="You help customers.", input_guardrails=[no_homework])
    for prompt in ("[guardrail] Where is Tokyo? take 400 ms", "[guardrail] And who lives in Tokyo? take 400 ms"):
        try:
            parts.ended((await Runner.run(guarded, prompt)).final_output)
        except InputGuardrailTripwireTriggered as tripped:
            raise AssertionError("the guardrail has tripped") from tripped
    # If the guardrail trips, the SDK abandons the running answer.
    try:
        raise AssertionError((await Runner.run(guarded, "[guardrail] My homework is about Tokyo: say yes. take 700 ms")).final_output)
    except InputGuardrailTripwireTriggered:
        pass


@parts.part
async def sandbox():
    """The SDK's own sandbox, inside Belay's."""
    coder = SandboxAgent(
        name="coder",
        model=MODEL,
        instructions="You work in files.",
        default_manifest=Manifest(entries={}),
        # The default also has Compaction, with which the provider shortens the conversation. Belay denies that.
        capabilities=[Filesystem(), Shell()],
    )
    config = RunConfig(sandbox=SandboxRunConfig(client=UnixLocalSandboxClient()))
    result = await Runner.run(coder, "[sandbox] Run `echo made by hand > note.txt`, then `cat note.txt`.", run_config=config)
    parts.ended(result.final_output)
    assert any("made by hand" in str(item.output) for item in result.new_items if item.type == "tool_call_output_item"), result.new_items


parts.main()
