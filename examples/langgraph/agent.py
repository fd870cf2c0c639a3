"""An agent with LangGraph. The environment has the addresses of the model and the tools.

The agent has no code for approvals: if a tool returns "pending", the model reads that like every other result.
"""

import asyncio
import os

from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent


async def main():
    client = MultiServerMCPClient({"tools": {"transport": "streamable_http", "url": os.environ["BELAY_MCP_URL"]}})
    agent = create_react_agent(ChatOpenAI(model=os.environ["MODEL"]), await client.get_tools())
    state = await agent.ainvoke({"messages": [("user", os.environ["BELAY_OBJECTIVE"])]}, {"recursion_limit": 200})
    print(state["messages"][-1].content)


asyncio.run(main())
