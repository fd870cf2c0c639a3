//! The harness's entry point: `serve` beside the agent, `probe` before it.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use belay::{
    evidence::record::Pod,
    harness::{self, Options, probe, server, undo},
    inherited,
    policy::config::HarnessConfig,
    wire,
};
use clap::{Parser, Subcommand};

/// Enforces an agent's contracts and budgets and writes its evidence.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Proves that this pod reaches the gateway and nothing else.
    Probe {
        /// The rendered configuration.
        #[arg(long)]
        config: PathBuf,
        /// Where to write what was seen.
        #[arg(long)]
        out: PathBuf,
        /// Address of this node, whose kubelet must not answer.
        #[arg(long, env = "HOST_IP")]
        host_ip: Option<std::net::IpAddr>,
    },
    /// Has the harness of this pod roll back another task, and waits for that. In the agent's place.
    Undo {
        /// Where the kubelet looks for what the pod's status is to say.
        #[arg(long, default_value = "/dev/termination-log")]
        message: PathBuf,
    },
    /// Serves the agent.
    Serve {
        /// The rendered configuration.
        #[arg(long)]
        config: PathBuf,
        /// What the probe wrote.
        #[arg(long)]
        containment: PathBuf,
        /// The projected token.
        #[arg(long)]
        token: PathBuf,
        /// The folder of evidence that is not stored yet.
        #[arg(long)]
        spool: PathBuf,
        /// Address of this node, whose kubelet must not answer.
        #[arg(long, env = "HOST_IP")]
        host_ip: Option<std::net::IpAddr>,
        /// This pod's name.
        #[arg(long, env = "POD_NAME")]
        pod_name: String,
        /// This pod's UID.
        #[arg(long, env = "POD_UID")]
        pod_uid: String,
        /// This node.
        #[arg(long, env = "NODE_NAME")]
        node_name: String,
        /// The pod's runtime class.
        #[arg(long, env = "RUNTIME_CLASS", default_value = "")]
        runtime_class: String,
        /// Name and digest of the NetworkPolicy.
        #[arg(long, env = "NETWORK_POLICY", default_value = "")]
        network_policy: String,
    },
}

fn kubelet(host_ip: Option<std::net::IpAddr>) -> Option<String> {
    host_ip.map(|address| std::net::SocketAddr::new(address, 10250).to_string())
}

fn main() -> anyhow::Result<ExitCode> {
    // Before anything is opened: what lies beyond standard error is whoever's started this container.
    let inherited = belay::inherited::descriptors();
    // Wall time, signals, the probe and the journal have this thread to themselves: agents are served on others.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = runtime.block_on(run(inherited));
    // A disk that does not answer keeps a thread, and must not keep us; nor does who does not read what we say.
    runtime.shutdown_background();
    belay::output::stdout().end();
    belay::output::stderr().end();
    code
}

async fn run(inherited: std::io::Result<Vec<belay::inherited::Descriptor>>) -> anyhow::Result<ExitCode> {
    rustls::crypto::ring::default_provider().install_default().ok().context("a TLS provider is installed already")?;
    let _telemetry = belay::telemetry::init("belay-harness")?;
    match Args::parse().command {
        Command::Probe { config, out, host_ip } => {
            let config: HarnessConfig = harness::read_json(&config)?;
            let targets = probe::Targets::new(&config.wiring.probe, kubelet(host_ip));
            let mut seen = probe::run(&targets, probe::Timing::START).await;
            probe::distrust(&mut seen, inherited::breaches(&inherited));
            std::fs::write(&out, serde_json::to_vec(&seen)?)
                .with_context(|| format!("cannot write {}", out.display()))?;
            if seen.contained {
                return Ok(ExitCode::SUCCESS);
            }
            tracing::error!(breaches = ?seen.breaches, "containment is not proven; the agent must not start");
            Ok(ExitCode::from(wire::EXIT_UNPROVEN))
        }
        Command::Undo { message } => {
            let report = undo::ask(server::AGENT, &message).await.context("cannot have the harness roll back")?;
            writeln!(std::io::stdout(), "{report}")?;
            Ok(if report.left.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Serve {
            config,
            containment,
            token,
            spool,
            host_ip,
            pod_name,
            pod_uid,
            node_name,
            runtime_class,
            network_policy,
        } => {
            let pod = Pod { name: pod_name, uid: pod_uid, node: node_name, runtime_class, network_policy };
            let options = Options { config, containment, token, spool, pod, kubelet: kubelet(host_ip) };
            Ok(ExitCode::from(harness::serve(options).await?.exit_code()))
        }
    }
}
