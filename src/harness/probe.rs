//! The containment probe: checks positive and negative controls in several consecutive rounds.
//!
//! Silence proves nothing by itself, so each round has a positive control (the gateway's port must answer) and negative ones (the gateway's
//! canary, the API server and the kubelet must not answer). How long a silence must be depends on the positive control of the same round: a
//! reachable target answers within [`Timing::floor`], or within ten times what the gateway just took.

use std::{sync::Arc, time::Duration};

use futures::future::{BoxFuture, join_all};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::{net::TcpStream, time::Instant};

use super::gate::Gate;
use crate::{evidence::record::Containment, policy::config::Probe};

/// The thresholds of a probe: when a round holds and when the probe gives up.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub struct Timing {
    /// Consecutive rounds in which both controls must hold.
    pub rounds: u32,
    /// The shortest silence that counts.
    pub floor: Duration,
    /// The timeout of the positive control.
    pub answer: Duration,
    /// When to give up. CNIs are known to take seconds.
    pub patience: Duration,
}

impl Timing {
    /// The probe before the agent starts.
    pub const START: Self = Self {
        rounds: 3,
        floor: Duration::from_millis(40),
        answer: Duration::from_secs(1),
        patience: Duration::from_secs(30),
    };
    /// The probe during the attempt. The gateway may be restarting, so the positive control gets more time.
    pub const REPEAT: Self = Self {
        rounds: 1,
        floor: Duration::from_millis(200),
        answer: Duration::from_secs(3),
        patience: Duration::from_secs(1),
    };
}

/// The addresses that the probe dials.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Targets {
    reachable: String,
    unreachable: Vec<String>,
}

impl Targets {
    /// Creates the targets from the rendered ones and the kubelet of this node, if it is known.
    pub fn new(probe: &Probe, kubelet: Option<String>) -> Self {
        let mut unreachable = probe.unreachable.clone();
        unreachable.extend(kubelet);
        Self { reachable: probe.reachable.clone(), unreachable }
    }
}

/// Probes until both controls have held for enough rounds or the patience ends.
pub async fn run(targets: &Targets, timing: Timing) -> Containment {
    let started = Instant::now();
    let mut rounds = 0;
    let mut breaches;
    loop {
        breaches = round(targets, timing).await;
        rounds = if breaches.is_empty() { rounds + 1 } else { 0 };
        if rounds >= timing.rounds || started.elapsed() >= timing.patience {
            break;
        }
        if rounds == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // Without a target that must stay silent, a probe could not fail, so it fails here.
    if targets.unreachable.is_empty() {
        breaches.push("there is no negative control: nothing to try that must not answer".into());
    }
    Containment {
        contained: breaches.is_empty() && rounds >= timing.rounds,
        rounds,
        millis: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        reachable: targets.reachable.clone(),
        unreachable: targets.unreachable.clone(),
        breaches,
    }
}

/// Adds breaches that were seen by other means, each once.
pub fn distrust(seen: &mut Containment, breaches: impl IntoIterator<Item = String>) {
    seen.breaches.extend(breaches.into_iter().collect::<std::collections::BTreeSet<_>>());
    seen.contained &= seen.breaches.is_empty();
}

async fn round(targets: &Targets, timing: Timing) -> Vec<String> {
    let asked = Instant::now();
    let answered = connects(&targets.reachable, timing.answer).await;
    if !answered {
        return vec![format!("{} did not answer, and must", targets.reachable)];
    }
    let silence = timing.floor.max(asked.elapsed() * 10);
    let tries = targets.unreachable.iter().map(|target| async move {
        connects(target, silence).await.then(|| format!("{target} answered, and must not"))
    });
    join_all(tries).await.into_iter().flatten().collect()
}

/// Returns whether a TCP connection is established. A reset also proves that packets pass, but not to whom: a policy that rejects instead
/// of dropping answers with a reset, and both keep the agent out.
async fn connects(target: &str, within: Duration) -> bool {
    matches!(tokio::time::timeout(within, TcpStream::connect(target)).await, Ok(Ok(_)))
}

/// A probe that dials from where the agent is.
pub trait Looking: Send + Sync {
    /// Probes once.
    fn look(&self, timing: Timing) -> BoxFuture<'_, Containment>;
}

/// Probes from this process: in a pod, harness and agent share one network.
impl Looking for Targets {
    fn look(&self, timing: Timing) -> BoxFuture<'_, Containment> {
        Box::pin(run(self, timing))
    }
}

/// Probes at random times while the attempt runs, and denies everything once isolation is lost.
pub async fn repeat(gate: Arc<Gate>, from: Arc<dyn Looking>) {
    loop {
        tokio::time::sleep(random_pause()).await;
        let mut seen = from.look(Timing::REPEAT).await;
        if !seen.contained {
            // One failure of the positive control may be a restart of the gateway. A real breach is seen again.
            seen = from.look(Timing { patience: Duration::from_secs(10), ..Timing::REPEAT }).await;
        }
        gate.contained(seen);
    }
}

/// Returns a pause between 20 s and 60 s, so that the agent cannot predict the probe.
fn random_pause() -> Duration {
    let mut byte = [0u8; 2];
    // Without randomness, the shortest pause is the safe one.
    let _ = SystemRandom::new().fill(&mut byte);
    Duration::from_millis(20_000 + u64::from(u16::from_le_bytes(byte)) * 40_000 / 65_536)
}

#[cfg(test)]
mod tests;
