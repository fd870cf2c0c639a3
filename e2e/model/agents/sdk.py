"""Calls models with the official Python SDKs of OpenAI and Anthropic: streamed, many at once, abandoned in the middle, and retried by the
SDKs themselves."""

import asyncio
import os

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

WORDS = [{"role": "user", "content": "write 60 words"}]
openai, anthropic = AsyncOpenAI(), AsyncAnthropic()
CLAUDE = "claude-sonnet-4-5"


async def chat(model="gpt-4o", leave=None):
    seen = 0
    async with await openai.chat.completions.create(model=model, messages=WORDS, stream=True, stream_options={"include_usage": True}) as stream:
        async for _ in stream:
            seen += 1
            if seen == leave:
                return seen
    return seen


async def responses(model="gpt-4o", leave=None):
    seen = 0
    async with await openai.responses.create(model=model, input=WORDS, stream=True) as stream:
        async for _ in stream:
            seen += 1
            if seen == leave:
                return seen
    return seen


async def messages(model=CLAUDE, leave=None):
    seen = 0
    async with anthropic.messages.stream(model=model, max_tokens=500, messages=WORDS) as stream:
        async for _ in stream:
            seen += 1
            if seen == leave:
                return seen
    return seen


async def cancelled(call):
    """Cancels a call after 0.3 s, as a server does when its user closes the page."""
    task = asyncio.create_task(call)
    await asyncio.sleep(0.3)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return True
    raise AssertionError("it was over before it was cancelled")


async def main():
    # Each SDK reads many streams to what it takes as their end. No stream may be charged for more than it cost.
    for _ in range(20):
        assert await chat() > 50 and await responses() > 50 and await messages() > 50
    print("PART streaming", flush=True)
    await asyncio.gather(*(call() for call in (chat, responses, messages) for _ in range(8)))
    print("PART together", flush=True)
    assert await chat("gpt-4o-fault-503x2") > 50
    assert await responses("gpt-4o-fault-429x1") > 50
    assert await messages(f"{CLAUDE}-fault-529x2") > 50
    print("PART retried", flush=True)
    for call, model in ((chat, "gpt-4o"), (responses, "gpt-4o"), (messages, CLAUDE)):
        await call(f"{model}-fault-pace-5", leave=9)
        await cancelled(call(f"{model}-fault-pace-20"))
        await cancelled(call(f"{model}-fault-slow-2000"))
    print("PART left", flush=True)
    # Calls still succeed after all this.
    assert await chat() > 50
    print("DONE", flush=True)


assert os.environ["OPENAI_BASE_URL"]
asyncio.run(main())
