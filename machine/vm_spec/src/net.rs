//! Network cards and what they are linked to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{OptionError, Options, disk::named};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected six hexadecimal bytes such as 52:54:00:12:34:56, not multicast";
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(expected)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| expected)?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 {
            return Err(expected);
        }
        Ok(Self(bytes))
    }
}

impl Serialize for MacAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

named! {
    /// Protocol of a forwarded port.
    Protocol {
        /// TCP.
        #[default]
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
    }
}

/// A port of the host that leads to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forward {
    /// Protocol.
    pub protocol: Protocol,
    /// Address of the host that is listened on.
    pub host_address: IpAddr,
    /// Port of the host; 0 lets the host choose.
    pub host_port: u16,
    /// Address of the guest; `None` for the one that DHCP gives.
    pub guest_address: Option<IpAddr>,
    /// Port of the guest.
    pub guest_port: u16,
}

impl Forward {
    /// Reads `[tcp|udp]:[HOSTADDR]:HOSTPORT-[GUESTADDR]:GUESTPORT`, and the short `tcp:HOSTPORT-GUESTPORT`.
    fn parse(text: &str) -> Option<Self> {
        let (protocol, rest) = text.split_once(':')?;
        let protocol = if protocol.is_empty() { "tcp" } else { protocol };
        let (host, guest) = rest.rsplit_once('-')?;
        let end = |text: &str| -> Option<(Option<IpAddr>, u16)> {
            let (address, port) = text.rsplit_once(':').unwrap_or(("", text));
            let address = address.trim_start_matches('[').trim_end_matches(']');
            let address = if address.is_empty() {
                None
            } else {
                Some(address.parse().ok()?)
            };
            Some((address, port.parse().ok()?))
        };
        let (host_address, host_port) = end(host)?;
        let (guest_address, guest_port) = end(guest)?;
        (guest_port != 0).then_some(Self {
            protocol: Protocol::parse(protocol)?,
            host_address: host_address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            host_port,
            guest_address,
            guest_port,
        })
    }
}

/// A link through the user-mode stack, which needs no privilege.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UserLink {
    /// Forwarded ports.
    pub forwards: Vec<Forward>,
    /// Keep the guest from reaching anything but forwarded ports.
    pub restrict: bool,
    /// Host name that DHCP gives.
    pub hostname: Option<String>,
}

/// A link to a tap interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapLink {
    /// Interface name.
    pub ifname: String,
}

/// What a network card is linked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum NetLink {
    /// User-mode stack.
    User(UserLink),
    /// Tap interface.
    Tap(TapLink),
}

/// A virtio network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// The link.
    pub link: NetLink,
    /// Ethernet address; `None` gives 52:54:00:12:34:56 and counting.
    pub mac: Option<MacAddress>,
    /// Pairs of queues.
    pub queues: u16,
    /// The card offers packed rings beside split ones.
    pub packed: bool,
}

impl NetSpec {
    /// Reads the value of `--net`; `none` gives `None`.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(option: &str, text: &str) -> Result<Option<Self>, OptionError> {
        let (kind, mut o) = Options::parse_with_first(option, text, "user, tap or none")?;
        let link = match kind.as_str() {
            "none" => {
                o.finish("nothing after none")?;
                return Ok(None);
            }
            "user" => NetLink::User(user(&mut o)?),
            "tap" => {
                let ifname = o
                    .take("ifname")?
                    .ok_or_else(|| o.error("tap needs ifname=NAME"))?;
                if ifname.is_empty() || ifname.len() > 15 || ifname.contains(['/', '\0', ' ']) {
                    return Err(o.error(format!("ifname={ifname}: expected an interface's name")));
                }
                NetLink::Tap(TapLink { ifname })
            }
            other => return Err(o.error(format!("'{other}': expected user, tap or none"))),
        };
        let mac = match o.take("mac")? {
            None => None,
            Some(text) => Some(
                text.parse()
                    .map_err(|why| o.error(format!("mac={text}: {why}")))?,
            ),
        };
        let queues = o.take_parsed("queues", "1 to 16", |t| {
            t.parse().ok().filter(|q| (1..=16).contains(q))
        })?;
        let packed = o.take_switch("packed")?.unwrap_or(true);
        o.finish("hostfwd, restrict, hostname, ifname, mac, queues, packed")?;
        Ok(Some(Self {
            link,
            mac,
            queues: queues.unwrap_or(1),
            packed,
        }))
    }
}

fn user(o: &mut Options) -> Result<UserLink, OptionError> {
    let mut forwards = Vec::new();
    for text in o.take_all("hostfwd")? {
        forwards.push(Forward::parse(&text).ok_or_else(|| {
            o.error(format!(
                "hostfwd={text}: expected tcp|udp:[HOSTADDR:]HOSTPORT-[GUESTADDR:]GUESTPORT"
            ))
        })?);
    }
    let restrict = o.take_switch("restrict")?.unwrap_or(false);
    Ok(UserLink {
        forwards,
        restrict,
        hostname: o.take("hostname")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_links() {
        let net = NetSpec::parse(
            "--net",
            "user,hostfwd=tcp:2222-22,hostfwd=udp:127.0.0.1:53-10.0.2.15:5353,mac=52:54:00:00:00:01",
        )
        .unwrap()
        .unwrap();
        let NetLink::User(user) = &net.link else {
            panic!("{net:?}")
        };
        assert_eq!(
            (user.forwards[0].host_port, user.forwards[0].guest_port),
            (2222, 22)
        );
        assert_eq!(user.forwards[1].protocol, Protocol::Udp);
        assert_eq!(
            user.forwards[1].guest_address,
            Some("10.0.2.15".parse().unwrap())
        );
        assert_eq!(net.mac.unwrap().to_string(), "52:54:00:00:00:01");
        let long = NetSpec::parse("--net", "user,hostfwd=tcp::8080-:80")
            .unwrap()
            .unwrap();
        let NetLink::User(long) = long.link else {
            panic!()
        };
        assert_eq!(
            (long.forwards[0].host_port, long.forwards[0].guest_port),
            (8080, 80)
        );
        let json = serde_json::to_string(&net).unwrap();
        assert_eq!(serde_json::from_str::<NetSpec>(&json).unwrap(), net);
    }

    #[test]
    fn refusals() {
        assert_eq!(NetSpec::parse("--net", "none"), Ok(None));
        for bad in [
            "",
            "bridge",
            "tap",
            "tap,ifname=",
            "user,hostfwd=tcp:1",
            "user,hostfwd=sctp:1-2",
            "user,mac=01:00:00:00:00:00",
            "user,mac=52:54:00",
            "user,queues=0",
            "user,what=1",
            "none,x=1",
        ] {
            assert!(NetSpec::parse("--net", bad).is_err(), "{bad}");
        }
    }
}
