//! A network namespace with a loopback interface and nothing else, for as long as somebody holds it.
//!
//! Promises: the harness's socket is made in there, and handed out to the harness, which stays outside: a socket belongs to the namespace
//! in which it was made. So the agent dials 127.0.0.1:9900 as in a pod, and there is nothing else to dial. The namespace ends with
//! whoever asked for it. Refuses: any other interface, and forwarding.

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

/// The hidden subcommand of `belay` that holds.
pub const HOLD: &str = "__hold";
/// Index of the loopback interface: the first in every namespace.
const LOOPBACK: i32 = 1;

/// Whoever holds the namespace: a process of ours, which ends when its standard input does.
pub struct Hold {
    child: Child,
    pid: u32,
    _open: UnixStream,
}

impl Hold {
    /// A new namespace, and the harness's socket in it. `belay` is this program.
    ///
    /// # Errors
    /// If the machine does not let users have namespaces, with what to do.
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

    /// The process that holds it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets go of it.
    pub async fn end(mut self) {
        // It has nothing to lose; whatever still runs in the namespace keeps that until it ends.
        let _ = tokio::time::timeout(GONE, self.child.kill()).await;
    }
}

/// For it to be gone: what the kernel holds fast is not waited for.
const GONE: Duration = Duration::from_secs(10);

/// What most often keeps users from having namespaces.
fn hint() -> &'static str {
    let restricted = std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns");
    if restricted.is_ok_and(|value| value.trim() == "1") {
        return "; AppArmor keeps users from namespaces here: `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0` allows them";
    }
    let none = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    if none.is_ok_and(|value| value.trim() == "0") {
        return "; there are no user namespaces here: `sudo sysctl user.max_user_namespaces=10000` allows them";
    }
    "; in a container, it has to be allowed to make user namespaces"
}

/// One socket, from whoever is at the other end.
fn receive(from: &UnixStream) -> io::Result<TcpListener> {
    let (mut byte, mut space) = ([0_u8; 1], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let sockets = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
        _ => None,
    });
    sockets.flatten().next().map(TcpListener::from).ok_or_else(|| io::Error::other("it was refused"))
}

/// What the hidden subcommand does: raises loopback, listens, hands the socket out, and holds the namespace.
///
/// # Errors
/// If it cannot.
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
    // Ends with whoever holds the other end, however that ends.
    input.lock().read_to_end(&mut Vec::new()).map(drop)
}

/// Sets IFF_UP of the loopback interface: rtnetlink(7), RTM_NEWLINK with an ifinfomsg.
fn raise_loopback() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_AND_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(REQUEST_AND_ACK.to_ne_bytes());
    message.extend([0; 8]);
    // Family, padding and type: any.
    message.extend([0; 4]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    // Protocol 0 is NETLINK_ROUTE.
    let kernel = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    send(&kernel, &message, SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    let (length, _) = recv(&kernel, &mut answer[..], RecvFlags::empty())?;
    // An nlmsghdr, and the error that it acknowledges with.
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
