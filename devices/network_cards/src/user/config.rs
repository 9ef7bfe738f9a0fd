//! What a person can set on the user-mode network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use crate::backend::NetError;

/// The settings of a user-mode network. The default is the network that QEMU's users know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserNetConfig {
    /// Nothing from the guest leaves the link but answers on forwarded ports.
    pub restrict: bool,
    /// IPv4 is spoken on the link.
    pub ipv4: bool,
    /// The IPv4 network: its address and the length of its prefix, 8 to 28 bits.
    pub net: (Ipv4Addr, u8),
    /// The gateway, which stands for the host; without it the second address of `net`.
    pub host: Option<Ipv4Addr>,
    /// The name server's address; without it the third address of `net`.
    pub dns: Option<Ipv4Addr>,
    /// The first address that DHCP gives out; without it the fifteenth address of `net`.
    pub dhcp_start: Option<Ipv4Addr>,
    /// IPv6 is spoken on the link.
    pub ipv6: bool,
    /// The IPv6 prefix, 64 bits long. The host is its second address, the name server its third.
    pub ipv6_prefix: Ipv6Addr,
    /// Connections to the gateway's address reach the host's loopback addresses.
    pub host_loopback: bool,
    /// The name that DHCP gives the guest.
    pub hostname: Option<String>,
    /// The domain name that DHCP tells.
    pub domainname: Option<String>,
    /// The domains that DHCP tells for name lookups (RFC 3397).
    pub dnssearch: Vec<String>,
    /// The largest IP packet on the link, in bytes; 1280 to 65,521. Told by DHCP and router advertisements
    /// when it is not 1500.
    pub mtu: u16,
    /// Ports of the host that lead to the guest.
    pub hostfwd: Vec<HostForward>,
    /// The file that says where the host's name servers are; it is read again when it changes.
    pub resolv_conf: PathBuf,
}

impl Default for UserNetConfig {
    fn default() -> Self {
        Self {
            restrict: false,
            ipv4: true,
            net: (Ipv4Addr::new(10, 0, 2, 0), 24),
            host: None,
            dns: None,
            dhcp_start: None,
            ipv6: true,
            ipv6_prefix: Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0),
            host_loopback: true,
            hostname: None,
            domainname: None,
            dnssearch: Vec::new(),
            mtu: 1500,
            hostfwd: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
        }
    }
}

/// TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to a port of the guest. As text: `tcp:[ADDR]:PORT-[ADDR]:PORT`, with IPv6 addresses in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostForward {
    /// The protocol.
    pub transport: Transport,
    /// Where the host listens; without an address on all IPv4 addresses.
    pub host: SocketAddr,
    /// Where it leads. Without an address: the first address that DHCP gives out.
    pub guest_addr: Option<IpAddr>,
    /// The port in the guest.
    pub guest_port: u16,
}

impl fmt::Display for HostForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        write!(f, "{transport}:{}-", self.host)?;
        match self.guest_addr {
            Some(addr) => write!(f, "{}", SocketAddr::new(addr, self.guest_port)),
            None => write!(f, ":{}", self.guest_port),
        }
    }
}

/// Cuts `[addr]:port` or `addr:port` or `:port` or `port`.
fn address_and_port(text: &str) -> Option<(Option<IpAddr>, u16)> {
    let (addr, port) = text.rsplit_once(':').unwrap_or(("", text));
    let port = port.parse().ok()?;
    if addr.is_empty() {
        return Some((None, port));
    }
    let addr = match addr.strip_prefix('[') {
        Some(rest) => IpAddr::V6(rest.strip_suffix(']')?.parse().ok()?),
        None => IpAddr::V4(addr.parse().ok()?),
    };
    Some((Some(addr), port))
}

impl FromStr for HostForward {
    type Err = NetError;

    fn from_str(text: &str) -> Result<Self, NetError> {
        let parsed = || {
            let (transport, rest) = text.split_once(':')?;
            let transport = match transport {
                "tcp" | "" => Transport::Tcp,
                "udp" => Transport::Udp,
                _ => return None,
            };
            // A dash stands in no address, but there must be exactly one.
            let (host, guest) = rest.split_once('-')?;
            let (host_addr, host_port) = address_and_port(host)?;
            let (guest_addr, guest_port) = address_and_port(guest)?;
            if guest_port == 0 {
                return None;
            }
            let host_addr = host_addr.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
            let host = SocketAddr::new(host_addr, host_port);
            Some(Self {
                transport,
                host,
                guest_addr,
                guest_port,
            })
        };
        parsed().ok_or_else(|| NetError::Config {
            option: "hostfwd",
            value: text.into(),
            expected: "expected tcp|udp:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT".into(),
        })
    }
}

/// The addresses of the link, worked out and checked.
#[derive(Debug, Clone)]
pub(crate) struct Addresses {
    pub(crate) net: Ipv4Addr,
    pub(crate) mask: Ipv4Addr,
    pub(crate) host: Ipv4Addr,
    pub(crate) dns: Ipv4Addr,
    pub(crate) dhcp_start: Ipv4Addr,
    pub(crate) prefix6: Ipv6Addr,
    pub(crate) host6: Ipv6Addr,
    pub(crate) dns6: Ipv6Addr,
    pub(crate) link_local6: Ipv6Addr,
    /// The Ethernet address of the gateway and of all else that is not the guest.
    pub(crate) mac: [u8; 6],
}

impl Addresses {
    /// Works the addresses out, or says which setting makes no sense.
    pub(crate) fn of(config: &UserNetConfig) -> Result<Self, NetError> {
        let refuse = |option, value: String, expected: &str| {
            Err(NetError::Config {
                option,
                value,
                expected: expected.into(),
            })
        };
        let (net, bits) = config.net;
        if !(8..=28).contains(&bits) {
            return refuse(
                "net",
                format!("{net}/{bits}"),
                "the prefix must be 8 to 28 bits long",
            );
        }
        if !config.ipv4 && !config.ipv6 {
            return refuse("ipv4", "off".into(), "one of ipv4 and ipv6 must be on");
        }
        if !(1280..=65_521).contains(&config.mtu) {
            return refuse("mtu", config.mtu.to_string(), "expected 1280 to 65521");
        }
        let mask = u32::MAX << (32 - u32::from(bits));
        let base = u32::from(net) & mask;
        let nth = |n: u32| Ipv4Addr::from(base | n);
        let host = config.host.unwrap_or(nth(2));
        let dns = config.dns.unwrap_or(nth(3));
        // As with QEMU's users: .15, where the network is large enough for sixteen of them.
        let dhcp_start = config
            .dhcp_start
            .unwrap_or(nth(if bits <= 27 { 15 } else { 4 }));
        for (option, addr) in [("host", host), ("dns", dns), ("dhcpstart", dhcp_start)] {
            let inside = u32::from(addr) & mask == base;
            if !inside || u32::from(addr) & !mask == 0 || u32::from(addr) | mask == u32::MAX {
                let expected = format!("expected an address of the network {}/{bits}", nth(0));
                return refuse(option, addr.to_string(), &expected);
            }
        }
        if host == dns || host == dhcp_start || dns == dhcp_start {
            let value = format!("{host}, dns={dns}, dhcpstart={dhcp_start}");
            return refuse("host", value, "these addresses must differ");
        }
        let prefix = u128::from(config.ipv6_prefix) >> 64 << 64;
        if config.ipv6_prefix.is_multicast() || config.ipv6_prefix.is_unspecified() {
            return refuse(
                "ipv6-net",
                config.ipv6_prefix.to_string(),
                "expected a /64 prefix",
            );
        }
        let [a, b, c, d] = host.octets();
        Ok(Self {
            net: nth(0),
            mask: mask.into(),
            host,
            dns,
            dhcp_start,
            prefix6: prefix.into(),
            host6: (prefix | 2).into(),
            dns6: (prefix | 3).into(),
            link_local6: Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2),
            mac: [0x52, 0x55, a, b, c, d],
        })
    }

    /// The broadcast address of the IPv4 network.
    pub(crate) fn broadcast(&self) -> Ipv4Addr {
        (u32::from(self.net) | !u32::from(self.mask)).into()
    }

    /// True if `addr` belongs to the link.
    pub(crate) fn is_local(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(a) => u32::from(a) & u32::from(self.mask) == u32::from(self.net),
            IpAddr::V6(a) => {
                u128::from(a) >> 64 == u128::from(self.prefix6) >> 64 || a.is_unicast_link_local()
            }
        }
    }

    /// True for the addresses that the stack itself answers for.
    pub(crate) fn is_own(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(a) => a == self.host || a == self.dns,
            IpAddr::V6(a) => a == self.host6 || a == self.dns6 || a == self.link_local6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_read_as_qemu_reads_them() {
        let f: HostForward = "tcp::2222-:22".parse().unwrap();
        assert_eq!(
            (f.transport, f.host),
            (Transport::Tcp, "0.0.0.0:2222".parse().unwrap())
        );
        assert_eq!((f.guest_addr, f.guest_port), (None, 22));
        let f: HostForward = "udp:127.0.0.1:53-10.0.2.20:5353".parse().unwrap();
        assert_eq!(f.to_string(), "udp:127.0.0.1:53-10.0.2.20:5353");
        let f: HostForward = "tcp:[::1]:80-[fec0::15]:8080".parse().unwrap();
        assert_eq!(f.to_string(), "tcp:[::1]:80-[fec0::15]:8080");
        let f: HostForward = "tcp:2222-22".parse().unwrap();
        assert_eq!(f.to_string(), "tcp:0.0.0.0:2222-:22");
    }

    #[test]
    fn forwards_that_make_no_sense_are_refused_with_a_line() {
        for text in [
            "",
            "tcp",
            "tcp:1",
            "sctp::1-:2",
            "tcp::70000-:22",
            "tcp::1-:0",
            "tcp:[::1:1-:2",
        ] {
            let error = text.parse::<HostForward>().unwrap_err().to_string();
            assert!(error.starts_with("hostfwd="), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
    }

    #[test]
    fn the_default_network_is_the_usual_one() {
        let a = Addresses::of(&UserNetConfig::default()).unwrap();
        assert_eq!(a.host, Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(a.dns, Ipv4Addr::new(10, 0, 2, 3));
        assert_eq!(a.dhcp_start, Ipv4Addr::new(10, 0, 2, 15));
        assert_eq!(a.broadcast(), Ipv4Addr::new(10, 0, 2, 255));
        assert_eq!(a.host6.to_string(), "fec0::2");
    }

    #[test]
    fn addresses_outside_the_network_are_refused() {
        let host = Some(Ipv4Addr::new(10, 0, 3, 2));
        let config = UserNetConfig {
            host,
            ..Default::default()
        };
        let error = Addresses::of(&config).unwrap_err().to_string();
        assert_eq!(
            error,
            "host=10.0.3.2: expected an address of the network 10.0.2.0/24"
        );
        let config = UserNetConfig {
            mtu: 100,
            ..Default::default()
        };
        assert!(Addresses::of(&config).is_err());
    }
}
