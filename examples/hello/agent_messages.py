"""An agent in forty lines: it asks a model what to do and does it, until there is no more to do. It knows nothing of Belay:
its environment says where the model (ANTHROPIC_BASE_URL), the tools (BELAY_MCP_URL) and the web (HTTPS_PROXY) are."""

import json
import os
import sys
import urllib.request


def post(url, **body):
    """A JSON reply. Who refuses says why, and that is the agent's last word."""
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream", "anthropic-version": "2023-06-01"}
    try:
        return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code}: {error.read().decode()}")


def mcp(method, **params):
    return post(os.environ["BELAY_MCP_URL"], jsonrpc="2.0", id=1, method=method, params=params)


def use(name, arguments):
    """A local tool or one of MCP's; an error is an answer like another."""
    try:
        if name == "look_up":
            return urllib.request.urlopen(arguments["url"], timeout=5).read(1000).decode()
        reply = mcp("tools/call", name=name, arguments=arguments)
        return reply["error"]["message"] if "error" in reply else reply["result"]["content"][0]["text"]
    except OSError as error:
        return f"failed: {error}"


tools = [{"name": t["name"], "input_schema": t["inputSchema"]} for t in mcp("tools/list")["result"]["tools"]]
model = os.environ["MODEL"]
messages = [{"role": "user", "content": os.environ["BELAY_OBJECTIVE"]}]
while True:
    reply = post(os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages", model=model, max_tokens=1000, messages=messages, tools=tools)
    messages.append({"role": "assistant", "content": reply["content"]})
    results = []
    for block in reply["content"]:
        if block["type"] == "text":
            print("model:", block["text"], flush=True)
        if block["type"] == "tool_use":
            result = use(block["name"], block["input"])
            print("  " + block["name"], json.dumps(block["input"]), "→", result, flush=True)
            results.append({"type": "tool_result", "tool_use_id": block["id"], "content": result})
    if not results:
        break
    messages.append({"role": "user", "content": results})
