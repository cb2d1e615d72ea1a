//! Hosts of a rack: network namespaces on one bridge. They belong to processes, so they go when those do.

use std::{
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// Of the harness, on the bridge.
pub const HUB: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// Runs a command to its end.
pub fn command(words: &str) -> Result<()> {
    let mut parts = words.split_whitespace();
    let program = parts.next().context("no command")?;
    let output = Command::new(program)
        .args(parts)
        .stdin(Stdio::null())
        .output()
        .with_context(|| words.to_owned())?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{words}: {}", told.trim());
    Ok(())
}

/// Makes the bridge, in the harness's own namespace.
pub fn bridge() -> Result<()> {
    command("ip link set lo up")?;
    command("ip link add rack type bridge")?;
    command(&format!("ip addr add {HUB}/24 dev rack"))?;
    command("ip link set rack up")
}

/// A namespace with one link to the bridge.
pub struct Host {
    /// Keeps the namespace.
    keeper: Child,
    /// The bridge's end of its link.
    port: String,
    /// On the other end.
    pub address: Ipv4Addr,
}

impl Host {
    /// The host of this number, from 2 on.
    pub fn new(number: u8) -> Result<Self> {
        let keeper = Command::new("unshare")
            .args(["--net", "sleep", "infinity"])
            .spawn()?;
        let host = Self {
            keeper,
            port: format!("port{number}"),
            address: Ipv4Addr::new(10, 77, 0, number),
        };
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let begin = Instant::now();
        while std::fs::read_link(host.namespace()).is_ok_and(|theirs| theirs == own) {
            if begin.elapsed() > Duration::from_secs(10) {
                bail!("unshare makes no namespace");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let (port, pid) = (&host.port, host.keeper.id());
        command(&format!(
            "ip link add {port} type veth peer name eth0 netns {pid}"
        ))?;
        command(&format!("ip link set {port} master rack up"))?;
        let inside = format!("nsenter --net={} ip", host.namespace().display());
        command(&format!("{inside} link set lo up"))?;
        command(&format!("{inside} addr add {}/24 dev eth0", host.address))?;
        command(&format!("{inside} link set eth0 up"))?;
        Ok(host)
    }

    /// To be entered.
    pub fn namespace(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.keeper.id()).into()
    }

    /// Cuts the link, or mends it.
    pub fn link(&self, up: bool) -> Result<()> {
        let word = if up { "up" } else { "down" };
        command(&format!("ip link set {} {word}", self.port))
    }

    /// Loses and delays packets on their way to it, or no longer.
    pub fn netem(&self, on: bool) -> Result<()> {
        let port = &self.port;
        match on {
            true => command(&format!(
                "tc qdisc add dev {port} root netem delay 15ms 5ms loss 4%"
            )),
            false => command(&format!("tc qdisc del dev {port} root")),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // It may be gone with the run.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
        let _ = command(&format!("ip link del {}", self.port));
    }
}
