//! The connection to the cluster, and the namespace, as kubectl determines them.

use std::path::PathBuf;

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};

use super::CliError;

/// Options for reaching the cluster.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Cluster {
    /// Namespace of the task or request [default: that of the kubeconfig's context]
    #[arg(short, long)]
    pub(super) namespace: Option<String>,
    /// Context of the kubeconfig
    #[arg(long)]
    context: Option<String>,
    /// Path of the kubeconfig [default: $KUBECONFIG, ~/.kube/config or the pod's own account]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
}

impl Cluster {
    /// Returns a client and the namespace.
    pub(super) async fn connect(&self) -> Result<(Client, String), CliError> {
        let options = KubeConfigOptions { context: self.context.clone(), ..KubeConfigOptions::default() };
        let unreachable = |e: &dyn std::fmt::Display| {
            CliError::new(format!("cannot find the cluster: {e}; set KUBECONFIG, or give --kubeconfig and --context"))
        };
        let config = match &self.kubeconfig {
            Some(file) => {
                let kubeconfig = Kubeconfig::read_from(file).map_err(|e| unreachable(&e))?;
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(|e| unreachable(&e))?
            }
            None if self.context.is_some() => Config::from_kubeconfig(&options).await.map_err(|e| unreachable(&e))?,
            None => Config::infer().await.map_err(|e| unreachable(&e))?,
        };
        let namespace = self.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).map_err(|e| unreachable(&e))?;
        Ok((client, namespace))
    }
}

/// Returns the API server's message, in one line.
pub(super) fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => {
            let mut words = other.to_string();
            let mut cause = std::error::Error::source(other);
            while let Some(inner) = cause {
                let text = inner.to_string();
                if !words.contains(&text) {
                    words = format!("{words}: {text}");
                }
                cause = inner.source();
            }
            words
        }
    }
}
