//! Two nginx on one machine that only pass requests on, with TLS between them: the path of [`super`] without Belay.

use std::{
    net::{SocketAddr, TcpListener},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Context;

use super::{Process, wait_for};

/// Starts both. Returns the processes and the address for requests.
pub async fn start(folder: &Path, upstream: SocketAddr) -> anyhow::Result<([Process; 2], SocketAddr)> {
    let certified = rcgen::generate_simple_self_signed(["exit".to_owned()])?;
    std::fs::write(folder.join("exit.crt"), certified.cert.pem())?;
    std::fs::write(folder.join("exit.key"), certified.signing_key.serialize_pem())?;
    let (entry, exit) = (free()?, free()?);
    let tls = format!("ssl_certificate {0}/exit.crt; ssl_certificate_key {0}/exit.key;", folder.display());
    let processes = [
        process(folder, "entry", &format!("listen {entry};"), &format!("https://{exit}"))?,
        process(folder, "exit", &format!("listen {exit} ssl; {tls}"), &format!("http://{upstream}"))?,
    ];
    for port in [entry, exit] {
        wait_for(|| std::net::TcpStream::connect(port).is_ok()).await.context("nginx does not start")?;
    }
    Ok((processes, entry))
}

fn free() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn process(folder: &Path, name: &str, listen: &str, to: &str) -> anyhow::Result<Process> {
    let home = folder.join(name);
    std::fs::create_dir_all(&home)?;
    let (scheme, address) = to.split_once("://").context("no scheme")?;
    let config = format!(
        "daemon off; master_process off; pid {home}/pid; error_log stderr crit; events {{}}
        http {{
            access_log off; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
            fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
            keepalive_requests 100000000; tcp_nodelay on;
            upstream next {{ server {address}; keepalive 256; keepalive_requests 100000000; }}
            server {{
                {listen}
                location / {{
                    proxy_pass {scheme}://next; proxy_http_version 1.1; proxy_set_header Connection \"\";
                    proxy_set_header Host $host; proxy_ssl_name exit; proxy_ssl_server_name on;
                }}
            }}
        }}",
        home = home.display()
    );
    std::fs::write(home.join("nginx.conf"), config)?;
    let program = std::env::var("BELAY_NGINX").unwrap_or_else(|_| "nginx".into());
    let child = Command::new(&program)
        .arg("-p")
        .arg(&home)
        .arg("-c")
        .arg(home.join("nginx.conf"))
        .args(["-e", "stderr"])
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}; `make cluster-up` fetches one (BELAY_NGINX)"))?;
    Ok(Process(child))
}
