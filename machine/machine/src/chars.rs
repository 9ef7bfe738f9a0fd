//! Character backends from the specification.

use std::sync::Arc;

use char_backends::{Null, OpenError};
use device_model::CharBackend;
use vm_spec::CharSpec;

use crate::MachineError;
use crate::lifecycle::{Lifecycle, Request};

/// Opens what stands behind a line. `option` is what messages call it.
pub(crate) fn open(
    option: &'static str,
    spec: &CharSpec,
    lifecycle: &Arc<Lifecycle>,
) -> Result<Arc<dyn CharBackend>, MachineError> {
    backend(spec, lifecycle).map_err(|source| MachineError::Character { option, source })
}

fn backend(spec: &CharSpec, lifecycle: &Arc<Lifecycle>) -> Result<Arc<dyn CharBackend>, OpenError> {
    Ok(match spec {
        CharSpec::Null => Arc::new(Null),
        CharSpec::Stdio => {
            let lifecycle = lifecycle.clone();
            Arc::new(char_backends::stdio(move || lifecycle.post(Request::Quit))?)
        }
        CharSpec::File { path } => Arc::new(char_backends::file(path)?),
        CharSpec::Unix {
            path,
            server: true,
            wait,
        } => Arc::new(char_backends::unix_server(path, *wait)?),
        CharSpec::Unix { path, .. } => Arc::new(char_backends::unix_client(path)?),
        CharSpec::Tcp {
            host,
            port,
            server: true,
            wait,
        } => Arc::new(char_backends::tcp_server(host, *port, *wait)?),
        CharSpec::Tcp { host, port, .. } => Arc::new(char_backends::tcp_client(host, *port)?),
        CharSpec::Pty => {
            let (stream, path) = char_backends::pty()?;
            eprintln!("corten: pseudo-terminal {}", path.display());
            Arc::new(stream)
        }
    })
}
