//! Checks a single record, by itself and against the policy under which it was written. The witness, which signs the record, and the
//! verifier use the same checks.
//!
//! Guarantees: the verifier accepts what the witness accepted by these checks, because the checks are the same.
//! Non-goals: what follows from earlier records, which [`state`](super::state) checks.

use jiff::Timestamp;

use super::record::{Channel, Event, Intent};
use crate::{
    canonical,
    policy::{
        config::{McpUpstream, PolicyConfig, Upstream},
        price,
    },
};

/// The years in which records are written. The calendars of readers end at different moments of the year 9999.
const YEARS: std::ops::RangeInclusive<i16> = 1970..=9998;

/// Parses a record's time: RFC 3339 in UTC to the millisecond, in a year in which records are written.
pub fn time(text: &str) -> Option<Timestamp> {
    let time: Timestamp = text.parse().ok()?;
    (format!("{time:.3}") == text && has_year(text)).then_some(time)
}

/// Parses the expiry of an approval: RFC 3339 in UTC to the second or finer.
pub fn expiry(text: &str) -> Option<Timestamp> {
    let time: Timestamp = text.parse().ok()?;
    let digits = text.get(19..).and_then(|rest| rest.strip_suffix('Z'))?;
    let fraction = digits.is_empty()
        || digits.strip_prefix('.').is_some_and(|digits| {
            (1..=9).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit())
        });
    let whole = format!("{time:.0}").get(..19) == text.get(..19);
    (fraction && whole && has_year(text)).then_some(time)
}

fn has_year(text: &str) -> bool {
    text.get(..4).and_then(|year| year.parse().ok()).is_some_and(|year| YEARS.contains(&year))
}

/// Returns the message for a text that is not a time of a record.
pub fn no_time(found: &str) -> String {
    format!("expected an RFC 3339 time to the millisecond, in a year from 1970 to 9998, found {found:?}")
}

/// Returns the first text in a record that must be a digest and is not.
pub fn undigested(event: &Event) -> Option<&String> {
    commitments(event).into_iter().find(|found| !canonical::is_digest(found))
}

/// Returns why the policy does not allow this tool call, if so.
pub fn misfit(intent: &Intent, policy: &PolicyConfig) -> Option<String> {
    if intent.channel != Channel::Tool {
        return None;
    }
    let Some(tool) = policy.tool(&intent.target) else {
        return Some(format!("expected a tool of the policy, found {}", intent.target));
    };
    let Some(effect) = intent.side_effect.filter(|effect| *effect >= tool.side_effect) else {
        let found = intent.side_effect.map_or("none", |e| e.as_str());
        return Some(format!(
            "expected the side effect {} of the contract of {} or a stricter one, found {found}",
            tool.side_effect.as_str(),
            tool.name
        ));
    };
    for effect in [tool.side_effect, effect] {
        if !policy.allowed_effects.contains(&effect) {
            return Some(format!("expected a side effect that the class allows, found {}", effect.as_str()));
        }
    }
    if let Some(most) =
        tool.limits.request_bytes.and_then(|most| u64::try_from(most).ok()).filter(|n| intent.request_bytes > *n)
    {
        return Some(format!(
            "expected at most {most} bytes of arguments of {}, found {}",
            tool.name, intent.request_bytes
        ));
    }
    let found = intent.definition_digest.as_deref();
    let expected = match &tool.upstream {
        Upstream::Mcp(McpUpstream { digest: Some(pin), .. }) if found == Some(pin) => return None,
        Upstream::Mcp(McpUpstream { digest: None, .. }) if found.is_some() => return None,
        Upstream::Http(_) if found.is_none() => return None,
        Upstream::Mcp(McpUpstream { digest: Some(pin), .. }) => pin.as_str(),
        Upstream::Mcp(_) => "the one that the upstream lists",
        Upstream::Http(_) => "none, because it is an HTTP tool",
    };
    Some(format!("expected the definition of {} to be {expected}, found {}", tool.name, found.unwrap_or("none")))
}

/// Returns why the cost that a model call reserved does not follow from the policy's prices, if so. The log does not say how the tokens
/// divide into prompt and reply. So the cost must lie between that of all tokens as prompt and that of all tokens as reply.
pub fn mispriced(intent: &Intent, policy: &PolicyConfig) -> Option<String> {
    if intent.channel != Channel::Model {
        return (intent.reserved_cost_micros != 0)
            .then(|| "expected a cost of model calls only, found one of another call".to_owned());
    }
    let model = intent.model.as_deref().unwrap_or_default();
    // What no provider charges for needs no price: lists of models and counts of tokens.
    if (intent.reserved_tokens, intent.reserved_cost_micros) == (0, 0) {
        return None;
    }
    let Some(price) = price::of(&policy.models.prices, model) else {
        let priced = policy.limits.cost_micros.is_none() && intent.reserved_cost_micros == 0;
        return (!priced).then(|| format!("expected a model that has a price, found {model:?}"));
    };
    let (tokens, found) = (intent.reserved_tokens, intent.reserved_cost_micros);
    let ends = [price.cost(tokens, 0), price.cost(0, tokens)];
    let (least, most) = (ends.into_iter().min()?, ends.into_iter().max()?);
    (!(least..=most).contains(&found)).then(|| {
        let [least, most, found] = [least, most, found].map(price::show);
        format!("expected {tokens} tokens of {model:?} to cost {least} to {most}, found {found}")
    })
}

/// Returns the commitments and digests in a record for which only their form can be checked.
fn commitments(event: &Event) -> Vec<&String> {
    match event {
        Event::Intent(intent) => intent.request_commitment.iter().collect(),
        Event::Outcome(outcome) => outcome
            .response_commitment
            .iter()
            .chain(&outcome.compensation_commitment)
            .chain(&outcome.certificate)
            .collect(),
        Event::TaskClosed(closed) => closed.images.values().collect(),
        Event::Replayed(replayed) => vec![&replayed.request_commitment, &replayed.response_commitment],
        Event::Denied(denied) => denied.request_commitment.iter().collect(),
        Event::ApprovalRequested(approval) | Event::ApprovalDecided(approval) => vec![&approval.request_commitment],
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_has_one_form_and_an_ordinary_year() {
        for holds in [
            "2026-11-26T21:00:00.123Z",
            "1970-01-01T00:00:00.000Z",
            "9998-12-31T23:59:59.999Z",
            "2024-02-29T00:00:00.000Z",
        ] {
            assert!(time(holds).is_some(), "{holds}");
        }
        for wrong in [
            "9999-12-31T23:59:59.999Z",
            "9999-01-01T00:00:00.000Z",
            "1969-12-31T23:59:59.999Z",
            "0000-01-01T00:00:00.000Z",
            "+02026-11-26T21:00:00.123Z",
            "2026-11-26T21:00:60.000Z",
            "2016-12-31T23:59:60.000Z",
            "2026-11-26T24:00:00.000Z",
            "2026-02-29T00:00:00.000Z",
            "2026-11-26T21:00:00Z",
            "2026-11-26T21:00:00.1234Z",
            "2026-11-26T21:00:00.123+00:00",
            "2026-11-26t21:00:00.123z",
            "2026-11-26 21:00:00.123Z",
            "2026-11-26T21:00:00.123Z ",
            "",
        ] {
            assert!(time(wrong).is_none(), "{wrong}");
        }
        for holds in ["2026-11-26T21:00:00Z", "2026-11-26T21:00:00.1Z", "2026-11-26T21:00:00.123456789Z"] {
            assert!(expiry(holds).is_some(), "{holds}");
        }
        for wrong in
            ["2026-11-26T21:00Z", "2026-11-26T21:00:00.Z", "2026-11-26T21:00:60Z", "2026-11-26T21:00:00+00:00", "soon"]
        {
            assert!(expiry(wrong).is_none(), "{wrong}");
        }
    }
}
