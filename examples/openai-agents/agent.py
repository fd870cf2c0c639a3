"""An agent with the OpenAI Agents SDK. The environment has the addresses of the model and the tools."""

import asyncio
import os

from agents import Agent, Runner, set_tracing_disabled
from agents.mcp import MCPServerStreamableHttp

# In seconds. A call can wait until its evidence is stored, or for an approver.
PATIENCE = 120


async def main():
    # The SDK would send traces to a host of OpenAI that the pack does not list. The evidence has more detail.
    set_tracing_disabled(True)
    shop = MCPServerStreamableHttp(
        {"url": os.environ["BELAY_MCP_URL"], "timeout": PATIENCE},
        client_session_timeout_seconds=PATIENCE,
        # Tells the model why a call was denied, so that it can do something else.
        failure_error_function=lambda context, error: f"failed: {error}",
    )
    async with shop:
        agent = Agent(name="support", model=os.environ["MODEL"], instructions="You help the customers of a shop.", mcp_servers=[shop])
        print((await Runner.run(agent, os.environ["BELAY_OBJECTIVE"], max_turns=20)).final_output)


asyncio.run(main())
