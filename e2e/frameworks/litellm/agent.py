"""LiteLLM's SDK: its function-calling example, with the APIs of both providers."""

import asyncio
import json
import os

import litellm
import parts
import pydantic

MODELS = [f"openai/{os.environ['MODEL']}", f"anthropic/{os.environ['MODEL_OF_ANTHROPIC']}"]
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
DOES = {"get_weather": parts.weather, "get_time": parts.time_of}
TOOLS = [{"type": "function", "function": {"name": name, "description": name, "parameters": PLACE}} for name in DOES]


class City(pydantic.BaseModel):
    thought: str
    name: str
    people: int


def converse(model, prompt, stream=False):
    messages = [{"role": "user", "content": prompt}]
    for _ in range(5):
        reply = litellm.completion(model=model, messages=messages, tools=TOOLS, stream=stream)
        if stream:
            reply = litellm.stream_chunk_builder(list(reply), messages=messages)
        said = reply.choices[0].message
        if not said.tool_calls:
            return parts.ended(said.content)
        messages.append(said.model_dump(exclude_none=True))
        for call in said.tool_calls:
            found = DOES[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": found})
    raise AssertionError("no end")


@parts.part
def tools():
    for model in MODELS:
        converse(model, parts.TOOLS)


@parts.part
def streaming():
    for model in MODELS:
        converse(model, parts.STREAMING, stream=True)


@parts.part
def parallel():
    for model in MODELS:
        converse(model, parts.PARALLEL)


@parts.part
async def together():
    ask = [litellm.acompletion(model=MODELS[0], messages=[{"role": "user", "content": prompt}]) for prompt in parts.TOGETHER]
    for reply in await asyncio.gather(*ask):
        parts.ended(reply.choices[0].message.content)


@parts.part
def structured():
    question = [{"role": "user", "content": parts.STRUCTURED}]
    for model in MODELS:
        reply = litellm.completion(model=model, messages=question, response_format=City)
        assert City.model_validate_json(reply.choices[0].message.content).name == "Tokyo", reply


parts.main()
