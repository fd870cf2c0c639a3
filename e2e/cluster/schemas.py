"""schemas.py OPENAPI.json FOLDER < CRDs.json: writes FOLDER/GROUP/KIND_VERSION.json, one self-contained JSON Schema each.

The API server's own description of its kinds is laxer than the server: here unknown fields are refused, and the few types that OpenAPI 2
cannot say (int-or-string, quantities, null for an optional field) are said.
"""
import json
import os
import sys

LOOSE = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["string", "number"]},
}


def strict(schema):
    """The same schema without unknown fields, at every depth."""
    if not isinstance(schema, dict):  # `true` or `false`
        return schema
    out = dict(schema)
    for key in ("items", "additionalProperties", "not"):
        if key in out:
            out[key] = strict(out[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = [strict(part) for part in out[key]]
    if "properties" in out:
        required = schema.get("required", [])
        out["properties"] = {name: strict(field) if name in required else nullable(strict(field))
                             for name, field in schema["properties"].items()}
        # Parts of a schema that describe only some of the fields are not asked about the others.
        if not schema.get("x-kubernetes-preserve-unknown-fields") and schema.get("type") == "object":
            out.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["string", "integer"]
    return nullable(out) if schema.get("nullable") else out


def nullable(schema):
    return {"if": {"type": "null"}, "else": schema}


def named(schema, group, version, kind):
    """Pins a top-level schema to its apiVersion and kind."""
    schema["properties"] = {**schema["properties"], "kind": {"const": kind},
                            "apiVersion": {"const": f"{group}/{version}" if group else version}}
    schema["required"] = sorted({"apiVersion", "kind", *schema.get("required", [])})
    return schema


def references(schema):
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix("#/definitions/")
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from references(item)


def write(schema, definitions, group, version, kind):
    needed, waiting = {}, list(references(schema))
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = definitions[name]
            waiting += references(needed[name])
    # kubeconform calls the core group by its version.
    path = os.path.join(folder, group or version, f"{kind.lower()}_{version}.json")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.{os.getpid()}", "w") as file:
        json.dump({"$schema": "http://json-schema.org/draft-07/schema#", **named(schema, group, version, kind), "definitions": needed}, file)
    os.replace(f"{path}.{os.getpid()}", path)


def documents(text):
    decoder, at = json.JSONDecoder(), 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        yield from document["items"] if document.get("kind") == "List" else [document]


openapi, folder = sys.argv[1:]
with open(openapi) as file:
    raw = json.load(file)["definitions"]
definitions = {name: LOOSE.get(name) or strict(schema) for name, schema in raw.items()}

for name, schema in raw.items():
    names = schema.get("x-kubernetes-group-version-kind", [])
    if len(names) == 1 and "properties" in schema:  # more than one: ListOptions and the like, which are no manifests
        write(dict(definitions[name]), definitions, *(names[0][key] for key in ("group", "version", "kind")))

for crd in documents(sys.stdin.read()):
    spec = crd["spec"]
    for version in spec["versions"]:
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
        write(schema, definitions, spec["group"], version["name"], spec["names"]["kind"])
