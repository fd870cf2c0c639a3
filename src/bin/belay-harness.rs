//! The harness's process: `serve` runs beside the agent, `probe` runs before it.

use std::{io::Write, path::PathBuf, process::ExitCode};

use anyhow::Context;
use belay::{
    ends::AttemptEnd,
    evidence::record::Pod,
    harness::{self, Options, compensation, probe, server},
    inherited,
    policy::config::HarnessConfig,
};
use clap::{Parser, Subcommand};

/// Enforces an agent's contracts and limits and writes its evidence.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks that this pod reaches the gateway and nothing else.
    Probe {
        /// File with the rendered configuration.
        #[arg(long)]
        config: PathBuf,
        /// File to write the result to.
        #[arg(long)]
        out: PathBuf,
        /// Address of this node, whose kubelet must not answer.
        #[arg(long, env = "HOST_IP")]
        host_ip: Option<std::net::IpAddr>,
    },
    /// Requests the rollback of another task from the harness of this pod, and waits for it. Runs in place of the agent.
    Undo {
        /// File from which the kubelet reads the termination message of the container.
        #[arg(long, default_value = "/dev/termination-log")]
        message: PathBuf,
    },
    /// Serves the agent.
    Serve {
        /// File with the rendered configuration.
        #[arg(long)]
        config: PathBuf,
        /// File that the probe wrote.
        #[arg(long)]
        containment: PathBuf,
        /// File with the projected token.
        #[arg(long)]
        token: PathBuf,
        /// Folder of the spool: evidence that is not stored yet.
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
        /// Name of this node.
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
    // Before anything is opened: descriptors beyond standard error belong to whatever started this container.
    let inherited = belay::inherited::descriptors();
    // The wall time, signals, the probe and the journal have this thread to themselves. Agents are served on other threads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = belay::threads::run_until_exit(runtime, run(inherited));
    // A reader that does not read the output must not block the exit.
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
            Ok(ExitCode::from(AttemptEnd::ContainmentUnproven.exit_code()))
        }
        Command::Undo { message } => {
            let report =
                compensation::ask(server::AGENT, &message).await.context("cannot have the harness roll back")?;
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
            Ok(ExitCode::from(harness::serve(options).await?.end().exit_code()))
        }
    }
}
