//! The host's name servers, and names in the form that packets carry.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::SystemTime;

use super::timers::Millis;

/// How often the file is looked at, at most.
const LOOK_AGAIN: Millis = 1000;
/// No more of the file is read, in bytes.
const LARGEST_FILE: u64 = 64 << 10;
/// resolv.conf(5), MAXNS.
const SERVERS: usize = 3;

/// Knows the host's name servers.
#[derive(Debug)]
pub(crate) struct Resolver {
    path: PathBuf,
    modified: Option<SystemTime>,
    looked_at: Option<Millis>,
    servers: Vec<IpAddr>,
    current: usize,
}

impl Resolver {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            modified: None,
            looked_at: None,
            servers: Vec::new(),
            current: 0,
        }
    }

    /// The server to ask now.
    pub(crate) fn server(&mut self, now: Millis) -> SocketAddr {
        self.refresh(now);
        let servers = &self.servers;
        // Without an entry the server is on this machine, says resolv.conf(5).
        let ip = servers
            .get(self.current)
            .copied()
            .unwrap_or(Ipv4Addr::LOCALHOST.into());
        SocketAddr::new(ip, 53)
    }

    /// `server` has not answered: the next one gets a chance.
    pub(crate) fn failed(&mut self, server: SocketAddr) {
        if self.servers.get(self.current) == Some(&server.ip()) {
            self.current = (self.current + 1) % self.servers.len();
        }
    }

    fn refresh(&mut self, now: Millis) {
        if self.looked_at.is_some_and(|at| now < at + LOOK_AGAIN) {
            return;
        }
        self.looked_at = Some(now);
        let modified = std::fs::metadata(&self.path)
            .and_then(|m| m.modified())
            .ok();
        if modified.is_some() && modified == self.modified {
            return;
        }
        self.modified = modified;
        let mut text = String::new();
        let read = std::fs::File::open(&self.path).and_then(|file| {
            std::io::Read::read_to_string(&mut std::io::Read::take(file, LARGEST_FILE), &mut text)
        });
        // An unreadable file has no servers in it.
        self.servers = if read.is_ok() {
            parse(&text)
        } else {
            Vec::new()
        };
        self.current = 0;
    }
}

/// The `nameserver` lines of a resolv.conf. Addresses that are bound to an interface are left out.
fn parse(text: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    };
    text.lines().filter_map(address).take(SERVERS).collect()
}

/// Appends a domain name as length-prefixed labels (RFC 1035, section 3.1); a name that can't be written so is left out.
pub(crate) fn push_name(out: &mut Vec<u8>, name: &str) {
    let labels: Vec<_> = name.trim_end_matches('.').split('.').collect();
    let fits = labels.iter().all(|l| (1..=63).contains(&l.len()));
    if !fits || name.len() > 253 {
        return;
    }
    for label in labels {
        out.push(label.len() as u8);
        out.extend_from_slice(label.as_bytes());
    }
    out.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_found_among_the_other_lines() {
        let text = "# nameserver 1.1.1.1\nsearch a.b\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\n\
                    nameserver ::1 \noptions x\nnameserver\n";
        let want: Vec<IpAddr> = vec!["192.0.2.1".parse().unwrap(), "::1".parse().unwrap()];
        assert_eq!(parse(text), want);
    }

    #[test]
    fn the_file_is_read_again_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let mut resolver = Resolver::new(path.clone());
        assert_eq!(resolver.server(0).to_string(), "127.0.0.1:53");
        std::fs::write(&path, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").unwrap();
        assert_eq!(resolver.server(500).to_string(), "127.0.0.1:53");
        let first = resolver.server(1000);
        assert_eq!(first.to_string(), "192.0.2.1:53");
        resolver.failed(first);
        resolver.failed(first);
        assert_eq!(resolver.server(1001).to_string(), "192.0.2.2:53");
    }

    #[test]
    fn names_become_labels() {
        let mut out = Vec::new();
        push_name(&mut out, "ab.example.");
        push_name(&mut out, "bad..name");
        assert_eq!(out, b"\x02ab\x07example\0");
    }
}
