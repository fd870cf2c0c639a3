"""What the model says. Only the request decides it, so the same request always has the same answer.

A user's message can ask for these things by name:
  - the name of an offered tool: the model calls all named tools in one turn (one a turn if parallel calls are off);
  - `code in backticks`: the model runs it with the tool that takes a command, one piece a turn;
  - "write N words": an answer of N words;
  - "think for N tokens": reasoning of N tokens, if the model reasons;
  - "take N ms": a wait of N ms before the reply.
The answer comes last: with the forced tool, in the requested schema with the keys in the schema's order, or as text.
"""

import json
import re
from dataclasses import dataclass, field

COMMANDS = ("command", "cmd", "commands", "script", "code")

# The tools with which frameworks ask for the final answer.
FINAL = ("final_result", "final_answer", "StructuredOutput")


@dataclass
class Tool:
    name: str
    schema: dict
    kind: str = "function"
    namespace: str | None = None


@dataclass
class Turn:
    """One message of the conversation: its role, its text, and the names of the tools that it calls."""

    role: str
    text: str = ""
    calls: list[str] = field(default_factory=list)


@dataclass
class Asked:
    """The parts of a request that the model needs, for any of the three APIs."""

    turns: list[Turn]
    tools: list[Tool]
    forced: str | None = None  # the name of a tool, or "any"
    parallel: bool = True
    schema: dict | None = None


@dataclass
class Text:
    text: str


@dataclass
class Call:
    tool: Tool
    arguments: str


def example(schema, prompt, root=None, depth=0):
    """Returns a value that the schema allows, with words of the prompt. Keys are in the schema's order, as with constrained decoders."""
    root = schema if root is None else root
    if not isinstance(schema, dict) or depth > 12:
        return {}
    if "$ref" in schema:
        target = root
        for part in schema["$ref"].lstrip("#/").split("/"):
            target = target.get(part, {})
        return example(target, prompt, root, depth + 1)
    for word in ("const", "default"):
        if schema.get(word) is not None:
            return schema[word]
    if schema.get("enum"):
        return next((one for one in schema["enum"] if str(one).lower() in prompt.lower()), schema["enum"][0])
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            some = [one for one in schema[word] if one.get("type") != "null"] or schema[word]
            return example(some[0], prompt, root, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if isinstance(kind, list):
        kind = next((one for one in kind if one != "null"), "null")
    if kind == "object":
        return {name: example(one, prompt, root, depth + 1) for name, one in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}), prompt, root, depth + 1) for _ in range(schema.get("minItems", 1))]
    if kind in ("integer", "number"):
        found = re.search(r"\d+", prompt)
        value = int(found.group()) if found else 1
        return min(max(value, schema.get("minimum", value)), schema.get("maximum", value))
    if kind == "boolean":
        # The answer to the question of a guardrail ("is this off topic?") is no, unless the prompt contains "say yes".
        return "say yes" in prompt
    if kind == "null":
        return None
    # The last capitalized word that does not begin a sentence, such as the name of a city.
    names = re.findall(r"(?m)(?<!^)(?<![.!?`] )\b[A-Z][a-z]+\b", prompt)
    return (names[-1] if names else "something")[: schema.get("maxLength", 100)].ljust(schema.get("minLength", 0), ".")


def named(asked):
    """Returns the last user message that asks for something by name, the tools and the code that it names, and the model's turns since."""
    for at in range(len(asked.turns) - 1, -1, -1):
        turn = asked.turns[at]
        if turn.role != "user":
            continue
        code = re.findall(r"`([^`\n]+)`", turn.text)
        shells = [tool for tool in asked.tools if any(name in COMMANDS for name in tool.schema.get("properties", {}))]
        wanted = [tool for tool in asked.tools if re.search(rf"(?<![\w-]){re.escape(plain(tool.name))}(?![\w-])", turn.text)]
        had = [one for one in asked.turns[at:] if one.role == "assistant"]
        if wanted or (code and shells):
            return turn.text, wanted, (code, shells), had
    return "", [], ([], []), []


def plain(name):
    """Returns a tool's name without the name of the server that some clients put before it."""
    return name.rsplit("__", 1)[-1]


def decide(asked):
    """Returns what the model says next: text, then calls."""
    prompt = "\n".join(turn.text for turn in asked.turns if turn.role == "user")
    if asked.forced and asked.forced != "any":
        tool = next(tool for tool in asked.tools if tool.name == asked.forced)
        return [Call(tool, json.dumps(example(tool.schema, prompt)))]
    text, wanted, (code, shells), had = named(asked)
    # If a message names tools, the model calls these. Code in the message is then only for a shell that the message names.
    named_shell = next((tool for tool in wanted if tool in shells), None)
    shell = named_shell or (None if wanted else next(iter(shells), None))
    if shell and code:
        if len(had) < len(code):
            return [Text("I run it."), Call(shell, json.dumps(with_code(shell, code[len(had)], text)))]
    else:
        called = [name for turn in had for name in turn.calls]
        missing = [tool for tool in wanted if tool.name not in called]
        # Some clients send calls back as text, so the number of turns counts, too.
        if missing and len(had) < len(wanted):
            some = missing if asked.parallel and not had else missing[:1]
            return [Text("I look.")] + [Call(tool, json.dumps(example(tool.schema, prompt))) for tool in some]
    called = {name for turn in asked.turns for name in turn.calls}
    if asked.forced == "any":
        last = [tool for tool in asked.tools if tool.name not in called] or asked.tools
        return [Call(last[-1], json.dumps(example(last[-1].schema, prompt)))]
    final = next((tool for tool in asked.tools if tool.name in FINAL and tool.name not in called), None)
    if final:
        return [Call(final, json.dumps(example(final.schema, prompt)))]
    if asked.schema:
        return [Text(json.dumps(example(asked.schema, prompt)))]
    last = next((turn.text for turn in reversed(asked.turns) if turn.role == "user"), "")
    long = re.search(r"write (\d+) words", last)
    if long:
        return [Text(" ".join(f"word{n}" for n in range(int(long.group(1)))))]
    return [Text("This is the whole answer. THE END")]


def with_code(tool, code, prompt):
    """Returns the arguments of a shell: the code in the argument for the command, and of the other arguments only the required ones."""
    required = tool.schema.get("required", [])
    arguments = {}
    for name, schema in tool.schema.get("properties", {}).items():
        if name in COMMANDS and not any(one in COMMANDS for one in arguments):
            arguments[name] = ["bash", "-lc", code] if schema.get("type") == "array" else code
        elif name in required:
            arguments[name] = example(schema, prompt)
    return arguments


def thinks(asked, at_rest):
    """Returns the number of reasoning tokens before the answer."""
    prompt = next((turn.text for turn in reversed(asked.turns) if turn.role == "user"), "")
    found = re.search(r"think for (\d+) tokens", prompt)
    return int(found.group(1)) if found else at_rest


def pieces(text):
    """Returns the tokens of a text, which have four characters each."""
    return [text[at : at + 4] for at in range(0, len(text), 4)]
