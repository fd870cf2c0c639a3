"""An agent written with the official Python SDK: `client.py URL '[["tool", {…}], …]'`. Prints what it saw as JSON."""

import asyncio
import json
import sys

from mcp import ClientSession
from mcp.client.streamable_http import streamablehttp_client


async def main(url, calls):
    async with streamablehttp_client(url) as (read, write, _), ClientSession(read, write) as session:
        begun = await session.initialize()
        tools = (await session.list_tools()).tools
        results = []
        for name, args in calls:
            result = await session.call_tool(name, args)
            text = "\n".join(part.text for part in result.content if part.type == "text")
            results.append({"isError": result.isError, "text": text, "structured": result.structuredContent})
    print(
        json.dumps(
            {
                "protocol": begun.protocolVersion,
                "tools": [{"name": tool.name, "outputSchema": tool.outputSchema} for tool in tools],
                "results": results,
            }
        )
    )


asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))
