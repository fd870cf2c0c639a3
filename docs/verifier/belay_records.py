"""What belay_verify.py needs of section 5 of docs/evidence-format.md: the forms of records and documents, and what
follows from what. Each rule of the section is a few lines here, under its number.

Promises: a record of which nothing is said against is one that the format lets follow those before it, by the policy
that it names. Of expressions (CEL) and patterns it knows neither meaning nor form: it takes the recorded word.
"""
import datetime, functools, math, re  # noqa: E401
from collections import Counter
from hashlib import sha256

# What is not as it must be raises a ValueError with a finding: what it is about, what was expected, what was found.
def show(value) -> str:
    text = ascii(value)
    return text if len(text) <= 160 else text[:157] + "..."

def need(holds, what: str, expected: str, found):
    if not holds:
        raise ValueError(f"{what}: expected {expected}, found {show(found)}")

def at(value, *path: str):  # a member in what may be anything; None if it is not there
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value

def inside(value):  # a value and all that is in it
    yield value
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inside(item)

# Forms: members and their types, `text` if none is given. After a member: `?` if it is optional, `!` if exactly one of
# those is there, `+` if one of those at least. A type is a form, `[type]` for a list of such, `{type}` for an object of
# such under any names, one of TYPES, or a pattern of a string.
HASH, RULE = "[0-9a-f]{64}", "[A-Za-z0-9.]{1,64}"
TIME = "([0-9]{4}-[0-9]{2}-[0-9]{2})T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]"
CLASSES, EFFECTS = ["Unclassified", "Internal", "Confidential", "Restricted"], ["read", "write", "external"]

def is_time(text, fraction: str = r"\.[0-9]{3}") -> bool:
    match = re.fullmatch(f"{TIME}{fraction}Z", text) if type(text) is str else None
    return bool(match) and 1970 <= datetime.date.fromisoformat(match[1]).year <= 9998  # which raises for no day

def whole(least: int, beyond: int):
    return lambda v: type(v) is int and least <= v < beyond

TYPES = {"flag": lambda v: type(v) is bool, "true": lambda v: v is True, "text": lambda v: type(v) is str,
         "json": lambda v: True, "something": lambda v: v is not None, "hash": HASH, "rule": RULE,
         "code": whole(-2**31, 2**31), "status": whole(0, 2**16), "port": whole(0, 2**16), "rounds": whole(0, 2**32),
         "count": whole(0, 2**53), "cost": whole(1, 2**53), "several": whole(2, 2**53), "size": whole(0, 2**64),
         "integer": whole(1 - 2**63, 2**63), "nonzero": lambda v: TYPES["integer"](v) and v != 0,
         "class": "|".join(CLASSES), "sensitive": "|".join(CLASSES[1:]), "effect": "|".join(EFFECTS),
         "channel": "tool|listing|model|egress", "state": "approved|denied|expired|pending",
         "time": is_time, "expiry": lambda v: is_time(v, r"(\.[0-9]{1,9})?")}
FORMS = {  # of records
    "record": "v:count seq:count time:time attempt:count actor:harness|gateway usage:usage kind",
    "usage": "toolCalls:count tokens:count denials:count costMicros?:cost",
    "attempt.opened": "verifierKey policyDigest:hash rollbackDigest?:hash pod:pod containment:containment.checked "
                      "local?:local",
    "pod": "name uid node runtimeClass networkPolicy", "local": "sandbox root store resolved?:[text]",
    "call.intent": "call channel:channel target sideEffect?:effect definitionDigest? "
                   "requestCommitment?:hash requestBytes:count rules:[rule] idempotencyKey? approvals?:[text] "
                   "compensates? assessment?:assessment model? reservedTokens:count reservedCostMicros?:cost",
    "assessment": "arguments:class seen:class rules?:[text] risk?:risk", "risk": "score:count terms:[text]",
    "call.outcome": "call outcome:applied|not_applied|unknown rule?:rule status:status responseCommitment?:hash "
                    "certificate?:hash responseBytes:count sentBytes?:count tokens:count costMicros?:cost upstream? "
                    "sensitivity?:sensitive compensationCommitment?:hash",
    "call.replayed": "call target idempotencyKey requestCommitment:hash responseCommitment:hash",
    "call.resolved": "call outcome:applied|not_applied by",
    "call.denied": "channel:channel target rule:rule reason requestCommitment?:hash count?:several",
    "approval.requested": "name uid requestedBy:Contract|Pack tool requestCommitment:hash required:count "
                          "expires:expiry reasons?:[text] state:state decisions?:[decision]",
    "decision": "by decision:Approve|Deny reason?",
    "containment.checked": "contained:flag rounds:rounds millis:count reachable unreachable:[text] breaches?:[text]",
    "attempt.closed": "reason", "task.closed": "phase failureClass reason exitCode?:code images?:{hash}",
}
FORMS["approval.decided"] = FORMS["approval.requested"]
FORMS |= {  # of documents: "The policy's form"
    "policy": "task:task pack:pack limits:limits allowedEffects:[effect] tools:[tool] models:models egress:[host] "
              "access?:access ignoredHosts?:[text] upstreamTimeoutSeconds?:integer",
    "task": "namespace name uid objective workflowClass taskClass? principal requester? image "
            "rollbackOf?:rollbackOf",
    "rollbackOf": "name uid", "pack": "name uid environment",
    "limits": "wallTimeSeconds:integer toolCalls:integer tokens:integer denials?:integer costMicros?:integer "
              "approvalWaitSeconds?:nonzero",
    "tool": "contract name description upstream:upstream input:json output?:something limits:toolLimits "
            "preconditions:[precondition] idempotency?:idempotency verify?:verify rollback?:rollback "
            "approval?:approval sideEffect:effect data?:data redact?:[text]",
    "upstream": "mcp!:mcp http!:http", "mcp": "url tool digest?",
    "http": "method:GET|HEAD|DELETE|POST|PUT|PATCH url query?:[text]",
    "toolLimits": "calls?:integer perMinute?:integer timeoutSeconds?:integer requestBytes?:integer "
                  "responseBytes?:integer",
    "precondition": "name cel message", "idempotency": "argument? header? windowSeconds:integer",
    "verify": "tool arguments:{text} applied settleSeconds:integer",
    "rollback": "call!:compensation byHand!", "compensation": "contract arguments:{text} withinSeconds?:integer",
    "approval": "when? approvers:approvers required:integer timeoutSeconds:integer onTimeout:Deny|EndTask "
                "holdSeconds:integer",
    "approvers": "users:[text] groups:[text]", "data": "arguments?:sensitive result?:sensitive",
    "models": "openai? anthropic? endpoints?:[endpoint] prices?:[price] allow?:[capability] unknownMembers?:Pass "
              "storeReplies?:Never streamUsage?:AsWritten",
    "endpoint": "models:[text] api:openai|anthropic url allow?:[capability] streamUsage?:AsWritten",
    "capability": "advisor|background|code_execution|compaction|data_sources|fallbacks|file_search|files|hosted_shell|"
                  "image_generation|mcp|stored|tool_search|web_fetch|web_search",
    "price": "model inputMicros:integer outputMicros:integer maxOutputTokens?:integer contextTokens?:integer "
             "outputLimitField?:max_tokens|max_completion_tokens tokenizer?:O200k|Bytes",
    "host": "host ports:[port] uses:[use] credential? barred?:true", "use": "Tools|Models|Direct",
    "access": "classification+:[pattern] rules+:[accessRule] risk+:accessRisk approval?:approval",
    "pattern": "name pattern sensitivity:class",
    "accessRule": "name principals?:[text] tools?:[text] effects?:[effect] when? decision:Allow|RequireApproval|Deny "
                  "message?",
    "accessRisk": "terms:[term] approveAt?:integer denyAt?:integer", "term": "name when points:integer",
    "plan": "origin size:size root steps:[step]", "step": "call tool by:by", "by": "call!:undo people!",
    "undo": "contract requestCommitment until?",
}
TYPES |= {name: FORMS.pop(name) for name in ("use", "capability")}

@functools.cache
def members(form: str) -> dict[str, tuple[str, str]]:  # by their names what stands after them, and their types
    each = (re.fullmatch(r"(\w+)([?!+]?)(?::(\S+))?", member).groups("text") for member in form.split())
    return {name: (mark, kind) for name, mark, kind in each}

def check_form(value, form: str, what: str):
    need(type(value) is dict, what, "an object", value)
    its = members(form)
    missing = [name for name, (mark, _) in its.items() if not mark and name not in value]
    need(not missing, what, f"the members {missing}", sorted(value))
    for mark, most in (("!", 1), ("+", math.inf)):
        some = [name for name in its if its[name][0] == mark]
        need(not some or 1 <= len(value.keys() & some) <= most, what, f"one of {some}", sorted(value))
    for name, member in value.items():
        need(name in its, what, "no such member", name)
        mark, kind = its[name]
        need(not mark or kind == "something" or member not in ([], {}), f"{what}: {name}", "none, or one not empty", {})
        check(member, kind, f"{what}: {name}")

def check(value, kind: str, what: str):
    of = TYPES.get(kind, kind)
    if kind in FORMS:
        check_form(value, FORMS[kind], what)
    elif callable(of):
        need(of(value), what, kind, value)
    elif of[0] + of[-1] in ("[]", "{}"):
        need(type(value) is (list if of[0] == "[" else dict), what, kind, value)
        for item in value if of[0] == "[" else value.values():
            check(item, of[1:-1], what)
    else:
        need(type(value) is str and re.fullmatch(of, value), what, of, value)

# What follows from what
def moment(time: str) -> int:  # in milliseconds
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (datetime.datetime.fromisoformat(time) - epoch) // datetime.timedelta(milliseconds=1)

def names(patterns, text: str) -> bool:  # a list names what is in it, or begins as an item that ends in `*`
    return patterns is None or any(text.startswith(p[:-1]) if p[-1:] == "*" else p == text for p in patterns)

class History:
    """What the records so far come to. `hold` takes what does not hold and is no reason not to read on."""

    def __init__(self, hold):
        self.hold, self.origin, self.last = hold, "", {"kind": None, "attempt": 0}
        # By the records: the newest policy, the plan, the attempt that is not closed, whether no probe has failed
        self.policy, self.plan, self.running, self.contained = None, None, 0, True
        # Calls: their intents, effects by their outcomes, what became of them, since which record that is not known
        self.usage, self.denials = Counter(), Counter()
        self.intents, self.outcomes, self.fates, self.lost = {}, {}, {}, {}
        # How often tools were called, the attempt and its definitions of tools, the classes of data handled
        self.calls, self.opened, self.definitions, self.seen = Counter(), 0, {}, 0
        # The calls that had idempotency keys last, and results that may be given again
        self.keys, self.given = {}, {}
        # Requests for approval with where they stand, those that were used, and the calls that undo others
        self.requests, self.used, self.undone = {}, set(), {}

    def tool(self, name: str) -> dict:
        return next((tool for tool in self.policy["tools"] if tool["name"] == name), {})

    def record(self, record: dict, documents: list):
        kind, actor, attempt, call = record["kind"], record["actor"], record["attempt"], record.get("call")
        hold, usage, last = self.hold, self.usage, self.last
        hold(last["kind"] != "task.closed", "rule 1", "nothing after task.closed", kind)
        hold((kind == "task.closed") == (actor == "gateway"), "rule 1", "the gateway for task.closed only", actor)
        hold(attempt >= last["attempt"], "rule 2", f"attempt {last['attempt']} or a later one", attempt)
        hold(attempt > 0 or kind == "task.closed", "attempt", "one from 1", attempt)
        need(kind in ("attempt.opened", "task.closed") or attempt == self.running, "rule 2",
             f"an attempt.opened of attempt {attempt} and no attempt.closed before", kind)
        match kind:
            case "attempt.opened":
                self.open(record, *documents)
            case "attempt.closed":
                self.running = 0
            case "containment.checked":
                self.contained &= record["contained"] and "breaches" not in record
            case "call.intent":
                self.intent(record)
            case "call.outcome":
                self.outcome(record)
            case "call.denied":
                usage["denials"] += record.get("count", 1)
                self.denials[record["rule"]] += record.get("count", 1)
                hold(not record.keys() >= {"count", "requestCommitment"}, kind, "a digest or a count", record)
                ignores = record["channel"] == "egress" and "ignoredHosts" in (self.policy or {})
                hold(record["rule"] != "egress.ignored" or ignores, "rule 8", "a policy that ignores hosts", record)
            case "call.replayed":
                self.replayed(record)
            case "call.resolved":
                self.resolved(record)
            case "approval.requested" | "approval.decided":
                self.approval(record)
        hold(Counter(record["usage"]) == usage, "rule 4", f"usage {dict(usage)}", record["usage"])
        self.usage, self.last = Counter(record["usage"]), record

    def open(self, record: dict, policy: dict, plan: dict | None = None):
        hold, probe, task = self.hold, record["containment"], policy["task"]
        hold(probe["contained"] and "breaches" not in probe, "rule 3", "contained true, no breaches", probe)
        uid = self.origin.removeprefix("belay.dev/task/")
        hold(task["uid"] == uid, "rule 3", f"a policy of {uid}", task["uid"])
        self.policy, self.running, self.contained = policy, record["attempt"], True
        self.lost = {call: record["seq"] for call, fate in self.fates.items() if fate == "open"} | self.lost
        if self.opened != record["attempt"]:
            self.opened, self.definitions = record["attempt"], {}
        of = at(task, "rollbackOf", "uid")
        hold(at(plan, "origin") == (of if of is None else f"belay.dev/task/{of}"), "rule 17", f"a plan for {of}", plan)
        hold(self.plan in (None, plan), "rule 17", "the plan that was there first", plan)
        self.plan = plan

    def intent(self, record: dict):
        call, channel, hold, usage = record["call"], record["channel"], self.hold, self.usage
        hold(call not in self.intents, "rule 5", "one intent of a call", call)
        hold(self.contained, "rule 7", "no intent after a containment.checked that has failed", call)
        limits, tokens, cost = self.policy["limits"], record["reservedTokens"], record.get("reservedCostMicros", 0)
        usage.update(toolCalls=int(channel == "tool"), tokens=tokens, costMicros=cost)
        counted = {"toolCalls": channel == "tool", "tokens": tokens > 0, "costMicros": cost > 0}
        for name in [name for name, counts in counted.items() if counts and name in limits]:
            number = 8 if name == "costMicros" else 6
            hold(usage[name] <= limits[name], f"rule {number}", f"at most {limits[name]} {name}", usage[name])
        denials = usage["denials"] - self.denials["egress.ignored"]
        hold(denials < limits.get("denials", math.inf), "rule 8", "none after so many denials", usage)
        self.priced(record)
        tool = self.tool(record["target"]) if channel == "tool" else {}
        self.keyed(record, tool.get("idempotency"))
        self.compensates(record, tool)
        if channel == "tool":
            self.allowed(record, tool)
            asked = {"Contract"} if "approval" in tool and "when" not in tool["approval"] else set()
            asked |= {"Pack"} if self.assessed(record, tool, self.policy.get("access", {})) else set()
            self.approved(record, asked)
        else:
            hold(not record.keys() & {"assessment", "approvals"}, "rule 16", "those of tool calls only", channel)
        self.intents[call], self.fates[call] = record, "open"

    def allowed(self, intent: dict, tool: dict):
        """Rules 6, 8 and 9."""
        hold, name, effect = self.hold, intent["target"], intent.get("sideEffect")
        definition = intent.get("definitionDigest")
        need(tool, "rule 6", "a tool of the policy", name)
        tighter = EFFECTS[EFFECTS.index(tool["sideEffect"]):]
        hold(effect in tighter, "rule 6", f"an effect of {tighter}", effect)
        allowed = self.policy["allowedEffects"]
        hold({tool["sideEffect"], effect} <= set(allowed), "rule 6", f"effects of {allowed}", effect)
        self.calls[name] += 1
        calls, size = tool["limits"].get("calls", math.inf), tool["limits"].get("requestBytes", -1)
        hold(self.calls[name] <= calls, "rule 8", f"at most {calls} calls of {name}", self.calls[name])
        hold(size < 0 or intent["requestBytes"] <= size, "rule 8", f"at most {size} bytes", intent["requestBytes"])
        mcp = tool["upstream"].get("mcp")
        holds = definition is None if mcp is None else definition == mcp.get("digest", definition) is not None
        hold(holds, "rule 9", f"none for http, and else one as in {show(mcp)}", definition)
        first = self.definitions.setdefault(name, definition)
        hold(definition == first, "rule 9", f"the attempt's definition {first}", definition)

    def priced(self, intent: dict):
        """Rule 10."""
        tokens, cost = intent["reservedTokens"], intent.get("reservedCostMicros", 0)
        if intent["channel"] != "model":
            return self.hold(cost == 0, "rule 10", "no cost but of models", cost)
        model, prices = intent.get("model", ""), self.policy["models"].get("prices", [])
        price = next((price for price in prices if names([price["model"]], model)), None)
        if price:
            each = [max(price[name], 0) for name in ("inputMicros", "outputMicros")]
            least, most = sorted(-(-tokens * micros // 10**6) for micros in each)
            self.hold(least <= cost <= most, "rule 10", f"a cost from {least} to {most}", cost)
        else:
            unpriced = cost == 0 and (tokens == 0 or "costMicros" not in self.policy["limits"])
            self.hold(unpriced, "rule 10", "a model that has a price", model)

    def keyed(self, intent: dict, of: dict | None):
        """Rule 11."""
        hold, key, digest = self.hold, intent.get("idempotencyKey"), intent.get("requestCommitment", "")
        hold((key is None) == (of is None), "rule 11", "a key just of an idempotent tool", key)
        if key is None or of is None:
            return
        made = sha256(f"{self.policy['task']['uid']}\n{intent['target']}\n{digest}".encode()).hexdigest()
        hold("argument" in of or key == made, "rule 11", f"the key {made}", key)
        taken = {key for key, call in self.keys.items() if self.fates[call] != "not_applied"}
        if key in taken:
            before = self.intents[self.keys[key]]
            again = "header" in of and before.get("requestCommitment", "") == digest
            unknown = self.lost.get(before["call"], math.inf) < math.inf
            free = not self.in_window(before, of, intent) or (again and unknown)
            hold(free, "rule 11", f"a key that is free, not that of {before['call']}", key)
        else:
            hold(len(taken) < 4096, "rule 11", "at most 4096 keys", key)
        self.keys[key] = intent["call"]

    def in_window(self, before: dict, of: dict, record: dict) -> bool:
        return moment(record["time"]) - moment(before["time"]) < 1000 * of["windowSeconds"]

    def replayed(self, record: dict):
        """Rule 12."""
        call, of = record["call"], self.tool(record["target"]).get("idempotency")
        holds = of and self.keys.get(record["idempotencyKey"]) == call and self.fates[call] == "applied"
        holds = holds and self.in_window(self.intents[call], of, record)
        holds = holds and self.intents[call].get("requestCommitment", "") == record["requestCommitment"]
        self.hold(holds, "rule 12", "the call that was made under the key, and applied", record)
        given = self.given.get(call)
        self.hold(given == record["responseCommitment"], "rule 12", f"its result {given}", record["responseCommitment"])

    def resolved(self, record: dict):
        call, by, since = record["call"], record["by"], self.lost.get(record["call"], math.inf)
        need(call in self.intents and by in self.intents, "rule 5", "two calls of the log", (call, by))
        read, verify = self.intents[by], self.tool(self.intents[call]["target"]).get("verify")
        self.hold(self.outcomes.get(by) == "applied" and read["seq"] > since, "rule 5",
                  f"a call of unknown fate, and by one that was made after record {since} and applied", (call, by))
        self.hold(read["channel"] == "tool" and read["target"] == at(verify, "tool"), "rule 13",
                  f"by a call of {at(verify, 'tool')}", read["target"])
        self.outcomes.setdefault(call, None)
        self.given.pop(call, None)
        self.lost[call], self.fates[call] = math.inf, record["outcome"]

    def outcome(self, record: dict):
        call, outcome, hold = record["call"], record["outcome"], self.hold
        intent = self.intents.get(call, {"attempt": None, "reservedTokens": 0, "target": ""})
        hold(intent["attempt"] == record["attempt"], "rule 5", "an intent of the call in the same attempt before", call)
        hold(call not in self.outcomes, "rule 5", "one outcome of a call, and none once it is resolved", call)
        self.outcomes[call] = self.fates[call] = outcome
        self.lost[call] = record["seq"] if outcome == "unknown" else math.inf
        self.usage.update(tokens=record["tokens"] - intent["reservedTokens"],
                          costMicros=record.get("costMicros", 0) - intent.get("reservedCostMicros", 0))
        tool, found = self.tool(intent["target"]), CLASSES.index(record.get("sensitivity", CLASSES[0]))
        if "responseCommitment" in record and "rule" not in record:
            self.given[call] = record["responseCommitment"]
            least = at(tool, "data", "result") or CLASSES[0]
            hold(found >= CLASSES.index(least), "rule 15", f"a result that is {least} at least", CLASSES[found])
        self.seen = max(self.seen, found)
        undoable = outcome == "applied" and self.plan is None and at(tool, "rollback", "call")
        hold("compensationCommitment" not in record or undoable, "rule 17", "no call that undoes this one", record)

    def approval(self, record: dict):
        """Rule 14, of requests."""
        hold, name, state, by, tool = self.hold, record["name"], record["state"], record["requestedBy"], record["tool"]
        asks = self.tool(tool) if by == "Contract" else self.tool(tool) and self.policy.get("access")
        asks = at(asks, "approval")
        hold(asks and asks["required"] == record["required"], "rule 14", f"what asks, as it does: {show(asks)}", record)
        call = (by, tool, record["requestCommitment"])
        of, before = self.requests.get(name, (call, state))
        hold(of == call, "rule 14", f"the call {of} that was asked about", call)
        hold(before != "denied" or state in ("denied", "pending"), "rule 14", "a no to stay one", state)
        hold(name in self.requests or len(self.requests) < 65536, "rule 14", "at most 65536 requests", name)
        if name not in self.requests or (state != "pending" and before != "denied"):
            self.requests[name] = call, state
        decisions, task = record.get("decisions", []), self.policy["task"]
        people = {decision["by"] for decision in decisions} - {task["principal"], task.get("requester")}
        voted = "approved" if len(people) >= max(record["required"], 1) else "pending"
        voted = "denied" if any(decision["decision"] == "Deny" for decision in decisions) else voted
        hold(state == voted or (state == "expired" and voted != "denied"), "rule 14", voted, state)

    def approved(self, intent: dict, asked: set[str]):
        """Rule 14, of calls."""
        given = set()
        for name in intent.get("approvals", []):
            (by, *call), state = self.requests.get(name, ((None,), None))
            expected = [intent["target"], intent.get("requestCommitment")]
            fits = state == "approved" and call == expected
            self.hold(fits and name not in self.used and by not in given, "rule 14",
                      f"an approval that was given, once, for {expected}", name)
            given.add(by)
        self.used |= set(intent.get("approvals", []))
        self.hold(asked <= given, "rule 14", f"to be approved on account of {asked}", given)

    def assessed(self, intent: dict, tool: dict, access: dict) -> bool:
        """Rules 15 and 16. Gives whether the pack asks people."""
        hold, found, data = self.hold, intent.get("assessment"), any("data" in each for each in self.policy["tools"])
        if found is None:
            hold(not access and not data, "rule 16", "an assessment", found)
            return False
        least = at(tool, "data", "arguments") or CLASSES[0]
        more = {pattern["sensitivity"] for pattern in access.get("classification", [])}
        level, seen, said = CLASSES.index(found["arguments"]), CLASSES[self.seen], found.get("rules", [])
        hold(CLASSES[level] == least or (CLASSES[level] in more and level > CLASSES.index(least)), "rule 15",
             f"{least}, or a higher class of {more}", CLASSES[level])
        hold(found["seen"] == seen, "rule 15", f"to have seen {seen}", found["seen"])
        self.seen = max(self.seen, level)
        apply = [rule for rule in access.get("rules", []) if self.is_for(rule, intent, tool)
                 and ("when" not in rule or rule["name"] in said)]
        decisions = [rule["decision"] for rule in apply]
        hold([rule["name"] for rule in apply] == said and "Deny" not in decisions and (apply or "rules" not in access),
             "rule 16", f"rules that let the call pass: {show(apply)}", said)
        risk, limits, score = found.get("risk"), access.get("risk"), 0
        if limits is None or risk is None:
            hold(risk == limits, "rule 16", "a risk just where the pack has one", risk)
            return "RequireApproval" in decisions
        terms = [term for term in limits["terms"] if term["name"] in risk["terms"]]
        for term in terms:
            score = min(max(score + term["points"], -2**63), 2**63 - 1)
        expected = {"score": score, "terms": [term["name"] for term in terms]}
        hold(risk == expected, "rule 16", f"the risk {expected}", risk)
        hold(score < limits.get("denyAt", math.inf), "rule 16", f"a risk below {limits.get('denyAt')}", score)
        return "RequireApproval" in decisions or score >= limits.get("approveAt", math.inf)

    def is_for(self, rule: dict, intent: dict, tool: dict) -> bool:
        effects = {intent.get("sideEffect")} | ({tool["sideEffect"]} if rule["decision"] != "Allow" else set())
        return (names(rule.get("principals"), self.policy["task"]["principal"])
                and names(rule.get("tools"), tool["name"])
                and bool(effects & set(rule.get("effects", EFFECTS))))

    def compensates(self, intent: dict, tool: dict):
        """Rule 17, of calls."""
        call, hold = intent.get("compensates"), self.hold
        if self.plan is None:
            return hold(call is None, "rule 17", "nothing that is undone but in a rollback", call)
        if call is None:
            reads = (intent["channel"], intent.get("sideEffect")) == ("tool", "read") or intent["channel"] == "listing"
            return hold(reads, "rule 17", "a rollback to read and to undo", intent)
        undo = next((at(step, "by", "call") for step in self.plan["steps"] if step["call"] == call), None)
        expected = (at(undo, "contract"), at(undo, "requestCommitment"))
        hold(undo and (tool.get("contract"), intent.get("requestCommitment", "")) == expected, "rule 17",
             f"the call of the plan {expected}", intent)
        until = at(undo, "until")
        in_time = until is None or is_time(until) and moment(intent["time"]) <= moment(until)
        hold(in_time, "rule 17", f"a call until {until}", intent["time"])
        before = self.undone.get(call)
        hold(before is None or self.fates[before] == "not_applied", "rule 17", f"one call, not after {before}", call)
        self.undone[call] = intent["call"]
