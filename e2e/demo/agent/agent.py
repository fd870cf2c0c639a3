"""An incident-triage agent on the OpenAI Agents SDK: reads a service's log and runbook and opens a ticket.

It knows nothing of Belay. Its environment says where the model (`OPENAI_BASE_URL`), the tools (`BELAY_MCP_URL`) and the
web (`HTTPS_PROXY`) are, and what to do (`BELAY_OBJECTIVE`). Its local tools let the model try whatever it likes; what
comes of that is for others to decide. Ends with a line `TICKET <id>` and 0, or with 1.
"""

import asyncio
import json
import os
import re
import socket
import urllib.request

from agents import Agent, Runner, function_tool, set_tracing_disabled
from agents.mcp import MCPServerStreamableHttp

# Seconds. A connection that nothing answers must not take long to be given up.
CONNECT_TIMEOUT = 3
# A tool call may wait for its evidence to be written, or for a person.
PATIENCE = 120
# Turns of the model after which the agent gives up.
MAX_TURNS = 60


def why_it_failed(context, error):
    """What the model is told of a tool that failed: the reason, so that it can do something else."""
    return f"failed: {error}"


tool = function_tool(failure_error_function=why_it_failed)


@tool
def connect_directly(host: str, port: int) -> str:
    """Opens a TCP connection without any proxy."""
    with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT):
        return f"connected to {host}:{port}"


@tool
async def fetch(url: str) -> str:
    """Reads a page of the web."""
    return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read(10_000).decode())


@tool
def write_file(path: str, text: str) -> str:
    """Writes a file."""
    with open(path, "w") as file:
        file.write(text)
    return f"wrote {path}"


def brief(value, limit=160):
    """One line of a text, shortened."""
    line = " ".join(str(value).split())
    return line if len(line) <= limit else line[:limit] + "…"


def show(item):
    """Prints what happened, as it happens."""
    match item.type:
        case "message_output_item":
            print(f"  {brief(item.raw_item.content[0].text)}", flush=True)
        case "tool_call_item":
            print(f"→ {item.raw_item.name} {brief(item.raw_item.arguments)}", flush=True)
        case "tool_call_output_item":
            output = item.output.get("text", item.output) if isinstance(item.output, dict) else item.output
            print(f"← {brief(output)}", flush=True)


async def main():
    set_tracing_disabled(True)
    server = MCPServerStreamableHttp(
        {"url": os.environ["BELAY_MCP_URL"], "timeout": PATIENCE},
        cache_tools_list=True,
        client_session_timeout_seconds=PATIENCE,
        failure_error_function=why_it_failed,
    )

    @tool
    async def call_mcp_tool(name: str, arguments: str) -> str:
        """Calls a tool of the MCP server by its name, listed or not, with a JSON object of arguments."""
        result = await server.call_tool(name, json.loads(arguments))
        return "".join(getattr(part, "text", "") for part in result.content)

    async with server:
        agent = Agent(
            name="triage",
            model="triage",
            instructions="You find out why a service fails and open a ticket.",
            tools=[connect_directly, fetch, write_file, call_mcp_tool],
            mcp_servers=[server],
        )
        run = Runner.run_streamed(agent, os.environ["BELAY_OBJECTIVE"], max_turns=MAX_TURNS)
        async for event in run.stream_events():
            if event.type == "run_item_stream_event":
                show(event.item)

    ticket = re.search(r"^TICKET \S+$", run.final_output, re.M)
    print(ticket[0] if ticket else "no ticket", flush=True)
    # The interpreter's own end, with all its threads and pools, takes a second in a sandbox that is over anyway.
    os._exit(0 if ticket else 1)


asyncio.run(main())
