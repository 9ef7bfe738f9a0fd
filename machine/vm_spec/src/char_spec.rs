//! Where a character device's bytes go.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::OptionError;

/// What stands behind a serial port or a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum CharSpec {
    /// The terminal, or standard input and output when they are none.
    Stdio,
    /// Output appended to a file.
    File {
        /// The file.
        path: PathBuf,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
        /// Listen for clients instead of connecting.
        server: bool,
        /// As a server, wait for the first client before the guest starts.
        wait: bool,
    },
    /// A TCP socket.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
        /// Listen for clients instead of connecting.
        server: bool,
        /// As a server, wait for the first client before the guest starts.
        wait: bool,
    },
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Output is thrown away.
    Null,
}

const EXPECTED: &str = "expected stdio, file:PATH, unix:PATH[,server[=on|off]][,wait[=on|off]], \
                        tcp:HOST:PORT[,server][,wait], pty, null or none";

impl CharSpec {
    /// Reads the value of `option`; `none` gives `None`.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn parse(option: &str, text: &str) -> Result<Option<Self>, OptionError> {
        let error = |message: String| OptionError::new(option, message);
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        let path = || match rest {
            "" => Err(error(format!("{kind}: needs a path; {EXPECTED}"))),
            path => Ok(PathBuf::from(path)),
        };
        Ok(Some(match kind {
            "none" if rest.is_empty() => return Ok(None),
            "stdio" if rest.is_empty() => Self::Stdio,
            "pty" if rest.is_empty() => Self::Pty,
            "null" if rest.is_empty() => Self::Null,
            "file" => Self::File { path: path()? },
            "unix" => {
                path()?;
                let (path, server, wait) = socket(option, rest)?;
                Self::Unix {
                    path: path.into(),
                    server,
                    wait,
                }
            }
            "tcp" => {
                let (address, server, wait) = socket(option, rest)?;
                let (host, port) = address
                    .rsplit_once(':')
                    .ok_or_else(|| error(format!("'{address}': expected HOST:PORT")))?;
                let port = port
                    .parse()
                    .map_err(|_| error(format!("port '{port}': expected 0 to 65535")))?;
                let host = host.trim_start_matches('[').trim_end_matches(']');
                let host = if host.is_empty() { "127.0.0.1" } else { host };
                Self::Tcp {
                    host: host.to_owned(),
                    port,
                    server,
                    wait,
                }
            }
            _ => return Err(error(format!("'{text}': {EXPECTED}"))),
        }))
    }
}

fn socket(option: &str, rest: &str) -> Result<(String, bool, bool), OptionError> {
    let (address, mut options) = crate::Options::parse_with_first(option, rest, "an address")?;
    let server = options.take_switch("server")?.unwrap_or(false);
    let wait = match options.take_switch("nowait")? {
        Some(nowait) => !nowait,
        None => options.take_switch("wait")?.unwrap_or(server),
    };
    options.finish("server, wait")?;
    Ok((address, server, wait))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let parse = |text| CharSpec::parse("--serial", text);
        assert_eq!(parse("stdio"), Ok(Some(CharSpec::Stdio)));
        assert_eq!(parse("none"), Ok(None));
        assert_eq!(
            parse("unix:/run/a,,b,server,wait=off"),
            Ok(Some(CharSpec::Unix {
                path: "/run/a,b".into(),
                server: true,
                wait: false
            }))
        );
        assert_eq!(
            parse("tcp:[::1]:4000,server=on"),
            Ok(Some(CharSpec::Tcp {
                host: "::1".into(),
                port: 4000,
                server: true,
                wait: true
            }))
        );
        for bad in [
            "",
            "std",
            "file:",
            "unix:",
            "tcp:1",
            "tcp:h:70000",
            "unix:/a,what",
            "pty:1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
