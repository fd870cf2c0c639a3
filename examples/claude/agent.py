"""An agent with Anthropic's SDK: the tool-use loop, with MCP tools. The environment has the addresses of the model and the tools."""

import asyncio
import os

from anthropic import AsyncAnthropic
from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client


async def use(shop, call):
    """Calls a tool and returns its result. If Belay denies the call, the denial is the result."""
    result = await shop.call_tool(call.name, call.input)
    text = "".join(part.text for part in result.content if part.type == "text")
    return {"type": "tool_result", "tool_use_id": call.id, "content": text, "is_error": result.isError}


async def main():
    claude = AsyncAnthropic()
    async with streamablehttp_client(os.environ["BELAY_MCP_URL"]) as (read, write, _), ClientSession(read, write) as shop:
        await shop.initialize()
        listed = (await shop.list_tools()).tools
        tools = [{"name": tool.name, "description": tool.description or "", "input_schema": tool.inputSchema} for tool in listed]
        messages = [{"role": "user", "content": os.environ["BELAY_OBJECTIVE"]}]
        while True:
            reply = await claude.messages.create(model=os.environ["MODEL"], max_tokens=1000, tools=tools, messages=messages)
            messages.append({"role": "assistant", "content": reply.content})
            print("".join(block.text for block in reply.content if block.type == "text"), flush=True)
            if reply.stop_reason != "tool_use":
                break
            results = [await use(shop, block) for block in reply.content if block.type == "tool_use"]
            messages.append({"role": "user", "content": results})


asyncio.run(main())
