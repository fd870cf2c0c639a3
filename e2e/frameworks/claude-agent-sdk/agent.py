"""Claude Agent SDK, which runs Claude Code: custom tools, its shell, streams, and answers in a schema."""

import asyncio
import os

import parts
from claude_agent_sdk import AssistantMessage, ClaudeAgentOptions, ResultMessage, StreamEvent, TextBlock, create_sdk_mcp_server, query, tool

SCHEMA = {
    "type": "object",
    "properties": {"thought": {"type": "string"}, "name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["thought", "name", "people"],
    "additionalProperties": False,
}


@tool("get_weather", "The weather of a city.", {"city": str})
async def get_weather(arguments):
    return {"content": [{"type": "text", "text": parts.weather(arguments["city"])}]}


@tool("get_time", "The time in a city.", {"city": str})
async def get_time(arguments):
    return {"content": [{"type": "text", "text": parts.time_of(arguments["city"])}]}


def options(**more):
    cities = create_sdk_mcp_server(name="cities", tools=[get_weather, get_time])
    allowed = ["mcp__cities__get_weather", "mcp__cities__get_time", "Bash"]
    return ClaudeAgentOptions(
        model=os.environ["MODEL"], mcp_servers={"cities": cities}, allowed_tools=allowed, cwd="/tmp", stderr=lambda line: print(line), **more
    )


async def ask(prompt, **more):
    texts, events, end = [], 0, None
    async for message in query(prompt=prompt, options=options(**more)):
        if isinstance(message, AssistantMessage):
            texts += [block.text for block in message.content if isinstance(block, TextBlock)]
        elif isinstance(message, StreamEvent):
            events += 1
        elif isinstance(message, ResultMessage):
            end = message
    assert end and not end.is_error, end
    return texts, events, end


@parts.part
async def tools():
    parts.ended((await ask(parts.TOOLS))[0][-1])


@parts.part
async def streaming():
    texts, events, _ = await ask(parts.STREAMING, include_partial_messages=True)
    assert events > 10, events
    parts.ended(texts[-1])


@parts.part
async def parallel():
    parts.ended((await ask(parts.PARALLEL))[0][-1])


@parts.part
async def together():
    for texts, _, _ in await asyncio.gather(*(ask(prompt) for prompt in parts.TOGETHER)):
        parts.ended(texts[-1])


@parts.part
async def structured():
    _, _, end = await ask(parts.STRUCTURED, output_format={"type": "json_schema", "schema": SCHEMA})
    assert end.structured_output["name"] == "Tokyo", end


@parts.part
async def shell():
    """Claude Code's own shell."""
    texts, _, _ = await ask("[shell] Use Bash to run `echo made by hand > /tmp/note.txt`.", permission_mode="acceptEdits")
    parts.ended(texts[-1])
    with open("/tmp/note.txt") as note:
        assert note.read() == "made by hand\n"


parts.main()
