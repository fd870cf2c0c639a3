//! Rule identifiers: the vocabulary of denials, evidence and metrics.
//!
//! Guarantees: the set of rules that this version writes is closed. What it reads may contain the rules of a later version. These are
//! preserved, because other names of rules do not make a log wrong. A process stores only a limited number of them, and in metrics they
//! share one label.

use std::{collections::BTreeSet, sync::LazyLock};

use parking_lot::Mutex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest name of a rule, in bytes.
const LONGEST: usize = 64;
/// Maximum number of rules of other versions that one process stores.
const MOST: usize = 4096;

/// The name of a rule that this version does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Foreign(&'static str);

impl Foreign {
    /// Stores a name for the life of the process. Returns `None` if the name is malformed, or if there are too many names.
    fn new(name: &str) -> Option<Self> {
        static NAMES: LazyLock<Mutex<BTreeSet<&'static str>>> = LazyLock::new(Mutex::default);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.';
        if !(1..=LONGEST).contains(&name.len()) || !name.bytes().all(plain) {
            return None;
        }
        let mut names = NAMES.lock();
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
            /// A rule of another version, in data that was read.
            Foreign(Foreign),
        }

        impl Rule {
            /// All rules.
            pub const ALL: &[Rule] = &[$(Rule::$variant),+];

            /// Returns the stable identifier.
            pub fn as_str(self) -> &'static str {
                match self { $(Rule::$variant => $id,)+ Rule::Foreign(Foreign(name)) => name }
            }

            /// Returns the rule with this name, or `None` if it cannot be the name of a rule.
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
    /// Returns the label in metrics. Rules of other versions share one label.
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
    ToolUnknown = "tool.unknown",
    /// The arguments fit the contract's input schema.
    ToolSchema = "tool.schema",
    /// Every precondition of the contract holds.
    ToolPrecondition = "tool.precondition",
    /// The class allows the contract's side effect.
    ToolEffect = "tool.effect",
    /// The arguments render to a request by the contract's URL template.
    ToolUrl = "tool.url",
    /// The upstream's definition of the tool matches the contract's pin, or without a pin the first definition that the attempt saw.
    ToolChanged = "tool.changed",
    /// The result fits the contract's output schema.
    ToolOutput = "tool.output",
    /// The contract has calls left.
    ToolLimitCalls = "tool.calls",
    /// The contract's calls per minute are not used up.
    ToolRate = "tool.rate",
    /// The tool replies within the contract's timeout.
    ToolTimeout = "tool.timeout",
    /// The arguments are not longer than the contract allows.
    ToolRequestBytes = "tool.requestBytes",
    /// The reply is not longer than the contract allows.
    ToolResponseBytes = "tool.responseBytes",
    /// No other call was made under the same idempotency key.
    ToolIdempotency = "tool.idempotency",
    /// Approvers have approved this exact call.
    ToolApproval = "tool.approval",
    /// The call is the compensation of another call, by the contract of that call, and was not made before.
    ToolRollback = "tool.rollback",
    /// A rule of the pack lets the principal make the call, and no rule denies it.
    AccessRule = "access.rule",
    /// The call's risk score is below the pack's limit.
    RiskScore = "access.risk",
    /// The attempt has time left.
    WallTime = "budget.wallTime",
    /// The task has tool calls left.
    ToolCalls = "budget.toolCalls",
    /// The task has tokens left for the prompt and the longest reply.
    Tokens = "budget.tokens",
    /// The task has money left for the prompt and the longest reply.
    Cost = "budget.cost",
    /// The task has had fewer denials than its limit.
    Denials = "budget.denials",
    /// The pack has an endpoint for this model API.
    ModelEndpoint = "model.endpoint",
    /// The cost and the effects of the model request can be bounded.
    ModelRequest = "model.request",
    /// The pack allows by name what the model request makes the provider do.
    ModelAllowed = "model.allowed",
    /// The pack lets unknown members of model requests pass.
    ModelUnknown = "model.unknown",
    /// The pack has a price for the model, if the task's cost has a limit.
    ModelPrice = "model.price",
    /// The host is well formed and listed by the class for this use.
    EgressHost = "egress.host",
    /// The port is listed with the host.
    EgressPort = "egress.port",
    /// Every address of the name is public.
    EgressAddress = "egress.address",
    /// The host may be used for the agent's own traffic.
    EgressDirect = "egress.direct",
    /// The host is not one whose denials the class does not count.
    EgressIgnored = "egress.ignored",
    /// The token is valid, for this audience and bound to a live pod.
    IdentityToken = "identity.token",
    /// The request comes from the address of the pod that the token is bound to.
    IdentitySource = "identity.source",
    /// The pod belongs to the newest attempt of a live task.
    IdentityAttempt = "identity.attempt",
    /// The call's intent is witnessed and stored.
    IntentMissing = "intent.missing",
    /// The harness runs with the policy that the gateway compiled.
    ConfigDigest = "config.digest",
    /// The segment extends the log's last head.
    LogFork = "log.fork",
    /// The segment is well formed, signed, and from the attempt that sends it.
    LogSegment = "log.segment",
    /// The task has not ended.
    TaskClosed = "task.closed",
    /// The pod still reaches the gateway and nothing else.
    ContainmentLost = "containment.lost",
    /// Evidence can be written.
    Evidence = "evidence.unavailable",
    /// The request is well formed.
    Request = "request.malformed",
    /// Every parser reads the JSON of the request in the same way.
    RequestJson = "request.json",
    /// The pod has fewer requests in progress than its limit.
    Busy = "request.busy",
    /// The upstream's name has an address.
    UpstreamResolve = "upstream.resolve",
    /// The upstream can be connected to.
    UpstreamConnect = "upstream.connect",
    /// The upstream's certificate is valid for its name.
    UpstreamTls = "upstream.tls",
    /// The upstream replies in time.
    UpstreamReply = "upstream.reply",
    /// The reply does not repeat the credential of its request.
    UpstreamSecret = "upstream.secret",
    /// The upstream's credential exists, and the task's principal may use it.
    UpstreamCredential = "upstream.credential",
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
