"""LangGraph: its quickstart (a graph of a model and its tools), and LangChain's agent on top of it."""

import asyncio
import os

import parts
import pydantic
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

model = ChatOpenAI(model=os.environ["MODEL"])


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return parts.weather(city)


@tool
def get_time(city: str) -> str:
    """The time in a city."""
    return parts.time_of(city)


class City(pydantic.BaseModel):
    """A city."""

    thought: str
    name: str
    people: int


def graph():
    caller = model.bind_tools([get_weather, get_time])
    steps = StateGraph(MessagesState)
    steps.add_node("model", lambda state: {"messages": [caller.invoke(state["messages"])]})
    steps.add_node("tools", ToolNode([get_weather, get_time]))
    steps.add_edge(START, "model")
    steps.add_conditional_edges("model", tools_condition)
    steps.add_edge("tools", "model")
    return steps.compile()


def ask(prompt):
    return {"messages": [("user", prompt)]}


@parts.part
def tools():
    parts.ended(graph().invoke(ask(parts.TOOLS))["messages"][-1].content)


@parts.part
def streaming():
    chunks = [chunk.content for chunk, _ in graph().stream(ask(parts.STREAMING), stream_mode="messages") if chunk.type == "AIMessageChunk"]
    assert len(chunks) > 5, chunks
    parts.ended("".join(chunks))


@parts.part
def parallel():
    parts.ended(graph().invoke(ask(parts.PARALLEL))["messages"][-1].content)


@parts.part
async def together():
    for message in await model.abatch(parts.TOGETHER):
        parts.ended(message.content)


@parts.part
def structured():
    agent = create_agent(model, tools=[], response_format=City)
    found = agent.invoke(ask(parts.STRUCTURED))["structured_response"]
    assert found.name == "Tokyo", found


parts.main()
