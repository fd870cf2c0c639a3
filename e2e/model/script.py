"""What the model says: decided by the request alone, so that the same request has the same answer.

A person's message asks for something by name:
  - the name of an offered tool: the tool is called, all that are named in one turn (one a turn where parallel calls are off);
  - `code in backticks`: run by the tool that takes a command, one piece a turn;
  - "write N words": an answer that long;
  - "think for N tokens": reasoning that long, of a model that reasons;
  - "take N ms": so long before anything is said.
Then comes the answer: by the tool that is forced, in the schema that is asked for with its keys in the schema's order, or as text.
"""

import json
import re
from dataclasses import dataclass, field

COMMANDS = ("command", "cmd", "commands", "script", "code")

# Tools by which frameworks have the last answer given.
FINAL = ("final_result", "final_answer", "StructuredOutput")


@dataclass
class Tool:
    name: str
    schema: dict
    kind: str = "function"
    namespace: str | None = None


@dataclass
class Turn:
    """One message of the conversation: its role, its text, and the names of tools that it calls."""

    role: str
    text: str = ""
    calls: list[str] = field(default_factory=list)


@dataclass
class Asked:
    """A request of any of the three APIs, as far as the model needs to know it."""

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
    """A value that the schema allows, from what the prompt mentions. Keys are in the schema's order, as constrained decoders write them."""
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
        # What guardrails ask ("is this off topic?") is not so, unless the prompt says that it is.
        return "say yes" in prompt
    if kind == "null":
        return None
    # The last name that the prompt mentions.
    names = re.findall(r"(?m)(?<!^)(?<![.!?`] )\b[A-Z][a-z]+\b", prompt)
    return (names[-1] if names else "something")[: schema.get("maxLength", 100)].ljust(schema.get("minLength", 0), ".")


def named(asked):
    """The last message of a person's that asks for something by name, what it asks for, and how many turns the model has had since."""
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
    """A tool's name without the server that some clients put before it."""
    return name.rsplit("__", 1)[-1]


def decide(asked):
    """What the model says next: some text, then calls."""
    prompt = "\n".join(turn.text for turn in asked.turns if turn.role == "user")
    if asked.forced and asked.forced != "any":
        tool = next(tool for tool in asked.tools if tool.name == asked.forced)
        return [Call(tool, json.dumps(example(tool.schema, prompt)))]
    text, wanted, (code, shells), had = named(asked)
    # A message that names tools wants those; code in it is for the shell that it names.
    named_shell = next((tool for tool in wanted if tool in shells), None)
    shell = named_shell or (None if wanted else next(iter(shells), None))
    if shell and code:
        if len(had) < len(code):
            return [Text("I run it."), Call(shell, json.dumps(with_code(shell, code[len(had)], text)))]
    else:
        called = [name for turn in had for name in turn.calls]
        missing = [tool for tool in wanted if tool.name not in called]
        # Where calls come back as text, turns count.
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
    """The arguments of a shell: the code where it belongs, and only what else is required."""
    required = tool.schema.get("required", [])
    arguments = {}
    for name, schema in tool.schema.get("properties", {}).items():
        if name in COMMANDS and not any(one in COMMANDS for one in arguments):
            arguments[name] = ["bash", "-lc", code] if schema.get("type") == "array" else code
        elif name in required:
            arguments[name] = example(schema, prompt)
    return arguments


def thinks(asked, at_rest):
    """How many tokens of reasoning come first."""
    prompt = next((turn.text for turn in reversed(asked.turns) if turn.role == "user"), "")
    found = re.search(r"think for (\d+) tokens", prompt)
    return int(found.group(1)) if found else at_rest


def pieces(text):
    """The tokens of a text."""
    return [text[at : at + 4] for at in range(0, len(text), 4)]
