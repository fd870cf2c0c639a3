//! Descriptors that the containment probe inherits from the process that starts it. A container runtime that leaves descriptors open does
//! not isolate.

use std::{fs, net::TcpListener, os::unix::process::ExitStatusExt, process::Command};

use belay::{
    ends,
    evidence::record::Containment,
    policy::config::{HarnessConfig, Probe, Wiring},
};

use crate::{LIMITS, policy};

/// Closes the shell's own descriptors, opens the descriptor of the case, and starts the probe.
const STARTED: &str = r#"
for path in /proc/$$/fd/*; do fd=${path##*/}; if [ "$fd" -gt 2 ]; then eval "exec $fd>&-"; fi; done
program=$1 config=$2 out=$3; eval "exec $4"
exec "$program" probe --config "$config" --out "$out"
"#;

#[test]
fn a_descriptor_of_whoever_starts_the_probe_is_a_breach() {
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let reachable = open.local_addr().unwrap().to_string();
    let probe = Probe { reachable: reachable.clone(), unreachable: vec![closed.to_string()] };
    let wiring = Wiring { attempt: 1, gateway: reachable, gateway_ca: String::new(), probe };
    let config = HarnessConfig { policy: policy(LIMITS), wiring };
    fs::write(at("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    let address = open.local_addr().unwrap();
    // The control comes first: no descriptor is open, and the probe finds no breach.
    for (opened, expected) in [
        ("", None),
        ("9</", Some("descriptor 9 is open, of /, and must not be")),
        ("251</etc/passwd", Some("descriptor 251 is open, of /etc/passwd")),
        ("7< <(sleep 0)", Some("descriptor 7 is open, of pipe:")),
        (format!("8<>/dev/tcp/127.0.0.1/{}", address.port()).as_str(), Some("descriptor 8 is open, of socket:")),
    ] {
        let mut command = Command::new("bash");
        command.args(["-c", STARTED, "bash", env!("CARGO_BIN_EXE_belay-harness")]);
        let started = command.arg(at("config.json")).arg(at("seen.json")).arg(opened).output().unwrap();
        let seen: Containment = serde_json::from_slice(&fs::read(at("seen.json")).unwrap_or_default())
            .unwrap_or_else(|error| panic!("{error}: {started:?}"));
        let code = i32::from(if expected.is_none() { 0 } else { ends::AttemptEnd::ContainmentUnproven.exit_code() });
        assert_eq!((started.status.code(), started.status.signal()), (Some(code), None), "{opened}: {started:?}");
        assert_eq!(seen.contained, expected.is_none(), "{opened}: {seen:?}");
        if let Some(expected) = expected {
            assert!(seen.breaches.iter().any(|one| one.contains(expected)), "{opened}: {seen:?}");
        }
    }
}
