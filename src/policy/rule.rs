//! Rule identifiers: the vocabulary of denials, evidence and metrics.
//!
//! Guarantees: what this version writes is a closed set. What it reads may have the names of a later version, which are kept as they are: a log is
//! not wrong because its rules have other names. Of those only so many are kept in memory, and in metrics they have one label.

use std::{
    collections::BTreeSet,
    sync::{LazyLock, Mutex, PoisonError},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest name of a rule, in bytes.
const LONGEST: usize = 64;
/// Names of rules of other versions that one process may meet.
const MOST: usize = 4096;

/// The name of a rule that this version does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Foreign(&'static str);

impl Foreign {
    /// Keeps a name for good. `None` if it is none, or there are too many.
    fn new(name: &str) -> Option<Self> {
        static NAMES: LazyLock<Mutex<BTreeSet<&'static str>>> = LazyLock::new(Mutex::default);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
        if !(1..=LONGEST).contains(&name.len()) || !name.bytes().all(plain) {
            return None;
        }
        let mut names = NAMES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(name) {
            return Some(Self(known));
        }
        (names.len() < MOST).then(|| {
            let kept: &'static str = Box::leak(name.into());
            names.insert(kept);
            Self(kept)
        })
    }
}

macro_rules! rules {
    ($($(#[$doc:meta])* $variant:ident = $id:literal),+ $(,)?) => {
        /// A rule, by its stable identifier.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Rule {
            $($(#[$doc])* $variant,)+
            /// One of another version, in what was read.
            Foreign(Foreign),
        }

        impl Rule {
            /// Every rule.
            pub const ALL: &[Rule] = &[$(Rule::$variant),+];

            /// The stable identifier.
            pub fn as_str(self) -> &'static str {
                match self { $(Rule::$variant => $id,)+ Rule::Foreign(Foreign(name)) => name }
            }

            /// The rule of that name; nothing where it is no rule's name.
            pub fn named(name: &str) -> Option<Self> {
                match name {
                    $($id => Some(Rule::$variant),)+
                    _ => Foreign::new(name).map(Rule::Foreign),
                }
            }
        }
    };
}

impl Rule {
    /// The label in metrics: names of other versions share one.
    pub fn label(self) -> &'static str {
        match self {
            Self::Foreign(_) => "other",
            known => known.as_str(),
        }
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Rule {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Name;
        impl serde::de::Visitor<'_> for Name {
            type Value = Rule;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "a rule's name: 1 to {LONGEST} letters, digits and dots")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Rule, E> {
                Rule::named(name).ok_or_else(|| E::invalid_value(serde::de::Unexpected::Str(name), &self))
            }
        }
        from.deserialize_str(Name)
    }
}

rules! {
    /// The tool is in one of the task's contracts.
    ToolKnown = "tool.unknown",
    /// The arguments fit the contract's input schema.
    ToolSchema = "tool.schema",
    /// Every precondition of the contract holds.
    ToolPrecondition = "tool.precondition",
    /// The class allows the contract's side effect.
    ToolEffect = "tool.effect",
    /// The arguments make a request of the contract's URL template.
    ToolUrl = "tool.url",
    /// The upstream's definition of the tool is the one that was approved.
    ToolChanged = "tool.changed",
    /// The result fits the contract's output schema.
    ToolOutput = "tool.output",
    /// The contract has calls left.
    ToolLimitCalls = "tool.calls",
    /// The contract's calls a minute are not used up.
    ToolRate = "tool.rate",
    /// The tool answers within the contract's time.
    ToolTimeout = "tool.timeout",
    /// The arguments are no longer than the contract lets them be.
    ToolRequestBytes = "tool.requestBytes",
    /// The reply is no longer than the contract lets it be.
    ToolResponseBytes = "tool.responseBytes",
    /// No call was made under the same idempotency key.
    ToolIdempotency = "tool.idempotency",
    /// People have approved this exact call.
    ToolApproval = "tool.approval",
    /// The call is what undoes another by that one's contract, and nobody has made it before.
    ToolRollback = "tool.rollback",
    /// A rule of the pack lets the principal make the call, and none forbids it.
    AccessRule = "access.rule",
    /// The call's risk is lower than the pack's limit.
    RiskScore = "access.risk",
    /// The attempt has time left.
    WallTime = "budget.wallTime",
    /// The task has tool calls left.
    ToolCalls = "budget.toolCalls",
    /// The task has tokens left for the prompt and the longest reply.
    Tokens = "budget.tokens",
    /// The task has money left for the prompt and the longest reply.
    Cost = "budget.cost",
    /// The task has had fewer calls refused than end it.
    Denials = "budget.denials",
    /// The pack has an endpoint for this model API.
    ModelEndpoint = "model.endpoint",
    /// The model request is one whose cost and effects can be bounded.
    ModelRequest = "model.request",
    /// The pack allows by name what the model request has the provider do.
    ModelAllowed = "model.allowed",
    /// The pack lets members of model requests pass that Belay does not know.
    ModelUnknown = "model.unknown",
    /// The pack has a price for the model, where the task's cost is limited.
    ModelPrice = "model.price",
    /// The host is well formed and on the class's list for this use.
    EgressHost = "egress.host",
    /// The port is listed with the host.
    EgressPort = "egress.port",
    /// Every address that the name has is public.
    EgressAddress = "egress.address",
    /// The host may be used for the agent's own traffic.
    EgressDirect = "egress.direct",
    /// The host is not one of those whose refusals the class does not count.
    EgressIgnored = "egress.ignored",
    /// The token is valid, for this audience and bound to a live pod.
    IdentityToken = "identity.token",
    /// The request comes from the address of the pod that the token is bound to.
    IdentitySource = "identity.source",
    /// The pod belongs to the newest attempt of a live task.
    IdentityAttempt = "identity.attempt",
    /// The call's intent is witnessed and stored.
    IntentMissing = "intent.missing",
    /// The harness runs by the policy that the gateway compiled.
    ConfigDigest = "config.digest",
    /// The segment extends the log's last head.
    LogFork = "log.fork",
    /// The segment is well formed, signed and its own.
    LogSegment = "log.segment",
    /// The task has not ended.
    TaskClosed = "task.closed",
    /// The pod still reaches the gateway and nothing else.
    ContainmentLost = "containment.lost",
    /// Evidence can be written.
    Evidence = "evidence.unavailable",
    /// The request is well formed.
    Request = "request.malformed",
    /// The request is JSON that can be read in one way only.
    RequestJson = "request.json",
    /// The pod has fewer requests under way than it may.
    Busy = "request.busy",
    /// The upstream's name has an address.
    UpstreamResolve = "upstream.resolve",
    /// The upstream can be connected to.
    UpstreamConnect = "upstream.connect",
    /// The upstream's certificate is valid for its name.
    UpstreamTls = "upstream.tls",
    /// The upstream answers in time.
    UpstreamReply = "upstream.reply",
    /// The reply does not repeat the credential that its request was made with.
    UpstreamSecret = "upstream.secret",
    /// The upstream's credential is there.
    UpstreamCredential = "upstream.credential",
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
