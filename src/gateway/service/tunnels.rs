//! The requests for tunnels: CONNECT to a host that the class lists for the agent's own traffic.
//!
//! Guarantees: a tunnel has a witnessed intent of its own, and ends when its pod, its permission or the gateway does. It is counted after
//! its first bytes are checked. Its bytes are in the request's span.
//!
//! Non-goals: what a tunnel carries ([`tunnel`]).

use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use http::{HeaderValue, Request, Response, header::HOST};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tracing::{Instrument, Span, field};

use super::{About, Asked, Gateway, Parts, Served, channel};
use crate::{
    evidence::record::Channel,
    gateway::{
        authorize::{self, Destination},
        body::full,
        refusal::Refused,
        tunnel,
    },
    policy::{config::SILENCE, rule::Rule},
    wire,
};

impl Gateway {
    pub(super) async fn tunnel(self: Arc<Self>, mut request: Request<Incoming>, asked: Asked) -> Served {
        asked.principal.may_call()?;
        let share = self.quotas.permit(&asked.principal, |share| &share.calls)?;
        let headers = request.headers();
        if channel(headers) != Some(Channel::Egress) {
            return Err(Refused::denied(
                Rule::EgressDirect,
                format!("a tunnel is for the agent's own traffic: expected {}: egress", wire::CHANNEL),
            ));
        }
        let uri = request.uri();
        let bare = uri.scheme().is_none() && uri.path_and_query().is_none();
        let to = uri.authority().filter(|_| bare).ok_or_else(|| Refused::malformed("expected CONNECT host:port"))?;
        let to = authorize::authority(to.as_str(), None)?;
        if !to.fits(headers.get_all(HOST).iter().map(HeaderValue::as_bytes)) {
            let reason = format!("expected Host to be {to}, as in CONNECT");
            return Err(Refused::denied(Rule::EgressHost, reason));
        }
        let tells = headers.contains_key(wire::OPENING) && tunnel::is_looked_at(&to);
        let (_, compiled, intent, _) =
            self.authorized(&asked.principal, Channel::Egress, Destination::Tunnel(&to), headers).await?;
        self.parts.witness.claim(&compiled.place(), &intent)?;
        let started = Instant::now();
        let dialled = self.parts.dialer.dial(&to).await;
        self.parts.metrics.upstream_took(Channel::Egress.as_str(), started.elapsed());
        let (upstream, address) = dialled?;
        Span::current().record("upstream", field::display(address));

        let upgrade = hyper::upgrade::on(&mut request);
        let gateway = self.clone();
        let run = async move {
            let Ok(agent) = upgrade.await else { return };
            gateway.relay((TokioIo::new(agent), tells), upstream, &to, &asked).await;
            drop(share);
        };
        tokio::spawn(run.instrument(Span::current()));
        let mut reply = Response::new(full(""));
        if let Ok(address) = HeaderValue::try_from(address.to_string()) {
            reply.headers_mut().insert(wire::UPSTREAM, address);
        }
        if tells {
            reply.headers_mut().insert(wire::OPENING, HeaderValue::from_static(wire::TOLD));
        }
        Ok(reply)
    }

    /// Runs a tunnel after the reply `200`. `tells` is whether the agent's side is told that the tunnel was allowed or denied.
    async fn relay(
        &self,
        (mut agent, tells): (TokioIo<hyper::upgrade::Upgraded>, bool),
        mut upstream: tokio::net::TcpStream,
        to: &crate::policy::hostname::Authority,
        asked: &Asked,
    ) {
        use tokio::io::AsyncWriteExt;
        let Parts { metrics, cluster, shutdown, .. } = &self.parts;
        let about = About::Call(Channel::Egress);
        let opening = match tunnel::opening(&mut agent, to).await {
            Ok(opening) => opening,
            Err(refused) => {
                self.count(about, Some(&refused));
                self.incident(asked.reviewed.pod.as_ref(), asked.peer, &refused);
                if tells {
                    let _ = tunnel::tell(&mut agent, Some(&refused)).await;
                }
                return;
            }
        };
        self.count(about, None);
        if tunnel::is_looked_at(to) && opening.is_empty() {
            return;
        }
        if tells && tunnel::tell(&mut agent, None).await.is_err() {
            return;
        }
        if upstream.write_all(&opening).await.is_err() {
            return;
        }
        let traffic = tunnel::Traffic::default();
        let silence = cluster.compiled(&asked.principal).map_or(SILENCE, |compiled| compiled.policy.silence());
        traffic.sent.fetch_add(u64::try_from(opening.len()).unwrap_or_default(), Ordering::Relaxed);
        let still = || {
            cluster.recheck_caller(&asked.reviewed, asked.peer)?;
            let compiled = cluster.compiled(&asked.principal)?;
            authorize::listed(&compiled, Channel::Egress, Destination::Tunnel(to), |_| false).map(|_| ())
        };
        metrics.tunnels.inc();
        let started = Instant::now();
        let end = tokio::select! {
            end = tunnel::relay(agent, upstream, (&traffic, silence), still) => format!("{end:?}"),
            () = shutdown.cancelled() => "the gateway stops".to_owned(),
        };
        metrics.tunnels.dec();
        let (sent, received) = (traffic.sent.load(Ordering::Relaxed), traffic.received.load(Ordering::Relaxed));
        Span::current().record("bytes_sent", sent).record("bytes_received", received);
        tracing::info!(sent, received, seconds = started.elapsed().as_secs_f64(), end, "a tunnel has ended");
    }
}
