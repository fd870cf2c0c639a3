#!/usr/bin/env python3
"""Checks the roles of the chart: only the gateway reads the Secrets of upstreams, and no role allows more than the tables here.

Reads the rendered chart from standard input, as JSON documents. `e2e/checks/charts` runs it under several settings.
"""

import json
import sys

SYSTEM = "belay-system"
READS = {"get", "list", "watch"}
# Verbs that give permissions away.
ESCALATES = {"bind", "escalate", "impersonate", "approve", "sign", "attest"}
# What neither the operator nor the gateway may touch, whatever the verb.
FORBIDDEN_GROUPS = {"rbac.authorization.k8s.io", "apps", "batch", "policy", "certificates.k8s.io", "apiextensions.k8s.io"}
FORBIDDEN = {"nodes", "serviceaccounts", "persistentvolumes", "persistentvolumeclaims", "events", "endpoints"}

# The Secrets with Belay's own keys and certificates. Each other Secret of the system namespace can be an upstream's.
OWN = {"belay-gateway-ca", "belay-gateway-tls", "belay-witness", "belay-webhook-tls"}

# The most that each account may do.
ACCOUNTS = {
    "belay-operator": {
        "agenttasks": "get list watch patch create act-for",
        "agenttasks/status": "patch",
        "agenttasks/finalizers": "update",
        "toolcontracts": "list watch",
        "toolcontracts/status": "patch",
        "policypacks": "list watch",
        "policypacks/status": "patch",
        "approvalrequests": "list watch",
        "namespaces": "list watch",
        "pods": "get list watch create delete",
        "networkpolicies": "get list watch create patch delete",
        "configmaps": "get create delete",
        "mutatingwebhookconfigurations": "list",
        "mutatingadmissionpolicies": "list",
        "mutatingadmissionpolicybindings": "list",
        "validatingwebhookconfigurations": "list watch patch",
        "secrets": "get create patch",
        "services": "list watch",
        "leases": "get create patch",
        "endpointslices": "get",
    },
    "belay-gateway": {
        "tokenreviews": "create",
        "pods": "get list watch",
        "agenttasks": "get list watch",
        "agenttasks/status": "patch",
        "toolcontracts": "list watch",
        "policypacks": "list watch",
        "namespaces": "list watch",
        "approvalrequests": "get list watch create",
        "secrets": "list watch",
    },
}
# The most that the roles for people allow.
PEOPLE = {
    "belay-view": {
        "agenttasks": "get list watch",
        "toolcontracts": "get list watch",
        "approvalrequests": "get list watch",
    },
    "belay-edit": {"agenttasks": "create update patch delete deletecollection"},
    "belay-admin": {"toolcontracts": "create update patch delete deletecollection"},
    "belay-act-for": {"agenttasks": "act-for"},
    "belay-approver": {"approvalrequests": "get list watch", "approvalrequests/status": "get patch update"},
}
# Resources whose changes are limited to objects of these names.
NAMED = {
    "validatingwebhookconfigurations": {"belay-webhook"},
    "leases": {"belay-operator"},
    "secrets": {"belay-gateway-tls", "belay-webhook-tls"},
}


def documents(text):
    """The JSON documents of a text, one after the other."""
    decoder, at = json.JSONDecoder(), 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        document, at = decoder.raw_decode(text, at)
        yield document


def rules(role):
    """Each pair of resource and verb of a role, with the API group and the names of objects."""
    for rule in role.get("rules") or []:
        for group in rule.get("apiGroups", []):
            for resource in rule.get("resources", []):
                for verb in rule["verbs"]:
                    yield group, resource, verb, set(rule.get("resourceNames", []))
        if rule.get("nonResourceURLs"):
            yield "", f"URL {rule['nonResourceURLs']}", "*", set()


def bindings(objects):
    """Each role with who has it and where: (account, namespace or None, role)."""
    roles = {(o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]): o for o in objects if o["kind"].endswith("Role")}
    for binding in (o for o in objects if o["kind"].endswith("RoleBinding")):
        namespace, of = binding["metadata"].get("namespace"), binding["roleRef"]
        role = roles.get((of["kind"], namespace if of["kind"] == "Role" else None, of["name"]))
        for subject in binding["subjects"]:
            who = subject["name"] if (subject["kind"], subject.get("namespace")) == ("ServiceAccount", SYSTEM) else json.dumps(subject)
            yield who, namespace, role or of


def secrets(objects):
    """Only the gateway reads Secrets that are not Belay's own, in the system namespace alone."""
    readers = set()
    for who, namespace, role in bindings(objects):
        for group, resource, verb, names in rules(role):
            if (group, resource) not in {("", "secrets"), ("", "secrets/*")} and "*" not in (group, resource):
                continue
            if verb in {"create", "patch", "update"} and (not names or names <= OWN):
                continue
            if names and names <= OWN:
                continue
            readers.add((who, namespace))
            if verb not in {"list", "watch"}:
                yield f"{who} may {verb} Secrets in {namespace or 'every namespace'}"
    if readers != {("belay-gateway", SYSTEM)}:
        yield f"expected the gateway alone to read Secrets of upstreams, in {SYSTEM}; found {sorted(map(str, readers))}"
    for role in objects:
        if role["kind"].endswith("Role") and role["metadata"]["name"] in PEOPLE:
            yield from (f"{role['metadata']['name']} has Secrets" for _, resource, _, _ in rules(role) if "secrets" in resource)


def verbs(objects):
    """No account may do more than the table says."""
    bound = {role["metadata"]["name"] for _, _, role in bindings(objects) if "metadata" in role}
    for who, namespace, role in bindings(objects):
        if who not in ACCOUNTS:
            yield f"{who} has {role.get('name') or role['metadata']['name']}"
    for role in (o for o in objects if o["kind"] in ("Role", "ClusterRole")):
        name = role["metadata"]["name"]
        table = {**ACCOUNTS, **PEOPLE}.get(name)
        if table is None:
            yield f"nothing is known of {role['kind']} {name}"
            continue
        if name in PEOPLE and (name in bound or role["kind"] == "Role"):
            yield f"{name} is for people, and the chart binds it"
        if role.get("aggregationRule"):
            yield f"{name} grows by aggregation"
        for group, resource, verb, names in rules(role):
            what = f"{role['kind']} {name}: {verb} {resource}"
            if "*" in group + resource + verb or verb in ESCALATES or resource.startswith("URL"):
                yield f"{what}: too much for anybody"
            if group in FORBIDDEN_GROUPS or resource in FORBIDDEN or resource.startswith(("pods/", "nodes/", "services/")):
                yield f"{what}: not Belay's to touch"
            if verb not in table.get(resource, "").split():
                yield f"{what}: not in the table"
            # `create` has no names in RBAC.
            if resource in NAMED and verb not in READS | {"create"} and not (names and names <= NAMED[resource]):
                yield f"{what}: of {sorted(names) or 'every name'}, expected at most {sorted(NAMED[resource])}"


def main():
    objects = list(documents(sys.stdin.read()))
    if len([o for o in objects if o["kind"].endswith("RoleBinding")]) < 5:
        sys.exit("expected the roles of a whole chart, found fewer bindings")
    wrong = list({"secrets": secrets, "verbs": verbs}[sys.argv[1]](objects))
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
