"""An agent on the OpenAI Agents SDK. Model and tools are where its environment says."""

import asyncio
import os

from agents import Agent, Runner, set_tracing_disabled
from agents.mcp import MCPServerStreamableHttp

# A call may wait for its evidence to be stored, or for a person.
PATIENCE = 120


async def main():
    # The SDK would send traces to a host of OpenAI's that the policy does not list: the evidence tells more.
    set_tracing_disabled(True)
    shop = MCPServerStreamableHttp(
        {"url": os.environ["BELAY_MCP_URL"], "timeout": PATIENCE},
        client_session_timeout_seconds=PATIENCE,
        # The model is told why a call was refused, so that it can do something else.
        failure_error_function=lambda context, error: f"failed: {error}",
    )
    async with shop:
        agent = Agent(name="support", model=os.environ["MODEL"], instructions="You help the customers of a shop.", mcp_servers=[shop])
        print((await Runner.run(agent, os.environ["BELAY_OBJECTIVE"], max_turns=20)).final_output)


asyncio.run(main())
