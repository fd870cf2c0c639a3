//! A network namespace with a loopback interface and nothing else. It lasts as long as a process holds it.
//!
//! Guarantees: the harness's socket is created in the namespace and passed to the harness, which stays outside. This works because a socket
//! belongs to the namespace in which it was created. So the agent dials 127.0.0.1:9900 as in a pod, and there is nothing else to dial. The
//! namespace ends with the process that requested it. It has no other interface and forwards nothing.

use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    process::Stdio,
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketType, recv, recvmsg, send, sendmsg, socket,
};
use tokio::process::{Child, Command};

use crate::{harness::server, run::RunError};

/// The hidden subcommand of `belay` that holds the namespace.
pub const HOLD: &str = "__hold";
/// The index of the loopback interface, which is the first in every namespace.
const LOOPBACK: i32 = 1;

/// The process that holds the namespace. It is a `belay` process that ends when its standard input ends.
pub struct Hold {
    child: Child,
    pid: u32,
    _open: UnixStream,
}

impl Hold {
    /// Creates a namespace, and the harness's socket in it. `belay` is the path of this program.
    ///
    /// # Errors
    /// Returns an error that says what to do if the machine does not let users create namespaces.
    pub async fn start(belay: &Path) -> Result<(Self, TcpListener), RunError> {
        let failed = |error: io::Error| RunError::Sandbox(format!("cannot hold a network namespace: {error}"));
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--"]).arg(belay).arg(HOLD);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.kill_on_drop(true).process_group(0).spawn().map_err(failed)?;
        drop(command);
        let pid = child.id().ok_or_else(|| failed(io::Error::other("it ended at once")))?;
        let waiting = ours.try_clone().map_err(failed)?;
        let received = tokio::task::spawn_blocking(move || receive(&waiting)).await.map_err(|e| failed(e.into()))?;
        match received {
            Ok(listener) => Ok((Self { child, pid, _open: ours }, listener)),
            Err(error) => {
                let said = child.wait_with_output().await.map(|out| out.stderr).unwrap_or_default();
                let said = String::from_utf8_lossy(&said).trim().replace('\n', "; ");
                Err(RunError::Sandbox(format!("cannot make a network namespace: {error}; {said}{}", hint())))
            }
        }
    }

    /// Returns the ID of the process that holds it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Ends the process that holds the namespace.
    pub async fn end(mut self) {
        // The process has no state to lose. Processes that still run in the namespace keep it until they end.
        let _ = tokio::time::timeout(GONE, self.child.kill()).await;
    }
}

/// The time to wait for the process to be gone. A process that the kernel does not release is not waited for.
const GONE: Duration = Duration::from_secs(10);

/// Returns a hint about the most likely reason why users cannot create namespaces.
fn hint() -> &'static str {
    let restricted = std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns");
    if restricted.is_ok_and(|value| value.trim() == "1") {
        return "; AppArmor keeps users from namespaces here: `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` allows them";
    }
    let none = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    if none.is_ok_and(|value| value.trim() == "0") {
        return "; there are no user namespaces here: `sudo sysctl user.max_user_namespaces=10000` allows them";
    }
    "; a container must be allowed to create user namespaces"
}

/// Receives one socket from the other end.
fn receive(from: &UnixStream) -> io::Result<TcpListener> {
    let (mut byte, mut space) = ([0_u8; 1], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let sockets = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    sockets.flatten().next().map(TcpListener::from).ok_or_else(|| io::Error::other("no socket came"))
}

/// Runs the hidden subcommand: raises loopback, listens, passes the socket on, and holds the namespace.
///
/// # Errors
/// Returns an error if one of these steps fails.
pub fn hold() -> io::Result<()> {
    raise_loopback()?;
    let listener = TcpListener::bind(server::AGENT)?;
    let input = io::stdin();
    let sockets = [listener.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::Error::other("there is no room for a socket"));
    }
    sendmsg(&input, &[IoSlice::new(b"s")], &mut ancillary, SendFlags::empty())?;
    drop(listener);
    // The read ends when the process at the other end ends, however it ends.
    input.lock().read_to_end(&mut Vec::new()).map(drop)
}

/// Sets IFF_UP on the loopback interface, see rtnetlink(7): RTM_NEWLINK with an ifinfomsg.
fn raise_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    // Family, padding and device type: unspecified.
    message.extend([0; 4]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    // Protocol 0 is NETLINK_ROUTE.
    let kernel = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &message, SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    let (length, _) = recv(&kernel, &mut answer[..], RecvFlags::empty())?;
    // The answer is an nlmsghdr, followed by the error code.
    let code = answer
        .get(..length)
        .and_then(|answer| answer.get(16..20))
        .and_then(|code| code.try_into().ok())
        .map(i32::from_ne_bytes);
    match code {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::Error::other("rtnetlink did not answer")),
    }
}
