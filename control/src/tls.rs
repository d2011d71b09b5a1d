//! TLS of the listener: a certificate with its key, and connections that have shaken hands. What is served
//! over them is `serve`'s matter; certificates are read once, at the start.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::limits::{HANDSHAKE_SECONDS_MAX, HANDSHAKES_MAX};

/// `[tls]`: both files in PEM form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate, followed by those between it and its authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// Why TLS cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate's file.
    #[error("cannot read the certificate {}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// A file without one.
    #[error("{} holds no certificate, expected one in PEM form", path.display())]
    NoCertificate {
        /// The file.
        path: PathBuf,
    },
    /// The key's file.
    #[error("cannot read the private key {}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: pem::Error,
    },
    /// Two that do not belong together.
    #[error("the key {} does not belong to the certificate {}", key.display(), certificate.display())]
    Mismatch {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
    },
    /// Anything else.
    #[error("certificate {} and key {} cannot be used", certificate.display(), key.display())]
    Unusable {
        /// The certificate's file.
        certificate: PathBuf,
        /// The key's.
        key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}

impl TlsConfig {
    /// Reads both files.
    ///
    /// # Errors
    /// [`TlsError`] names the file that is at fault.
    pub fn load(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let Self { certificate, key } = self;
        let chain = certificates(certificate)?;
        let private = PrivateKeyDer::from_pem_file(key)
            .map_err(|source| TlsError::Key { path: key.clone(), source })?;
        let failed = |source| {
            let (certificate, key) = (certificate.clone(), key.clone());
            match source {
                rustls::Error::InconsistentKeys(_) => TlsError::Mismatch { certificate, key },
                source => TlsError::Unusable { certificate, key, source },
            }
        };
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let mut config =
            config.with_no_client_auth().with_single_cert(chain, private).map_err(failed)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let failed = |source| TlsError::Certificate { path: path.to_owned(), source };
    let chain = CertificateDer::pem_file_iter(path).map_err(failed)?;
    let chain = chain.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    if chain.is_empty() {
        return Err(TlsError::NoCertificate { path: path.to_owned() });
    }
    Ok(chain)
}

type Shaken = io::Result<(TlsStream<TcpStream>, SocketAddr)>;

/// A listener whose connections have shaken hands. Handshakes run side by side: a client that is slow
/// with its own holds nobody up.
pub(crate) struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    handshakes: JoinSet<Shaken>,
}

impl TlsListener {
    pub(crate) fn new(listener: TcpListener, config: Arc<ServerConfig>) -> Self {
        Self { listener, acceptor: config.into(), handshakes: JoinSet::new() }
    }

    fn shake(&mut self, stream: TcpStream, peer: SocketAddr) {
        let accepting = self.acceptor.accept(stream);
        self.handshakes.spawn(async move {
            let longest = Duration::from_secs(HANDSHAKE_SECONDS_MAX);
            let accepted = tokio::time::timeout(longest, accepting).await;
            Ok((accepted.map_err(|_late| io::Error::from(io::ErrorKind::TimedOut))??, peer))
        });
    }
}

impl Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let room = self.handshakes.len() < HANDSHAKES_MAX;
            tokio::select! {
                Some(ended) = self.handshakes.join_next() => match ended {
                    Ok(Ok(connection)) => return connection,
                    Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                    Err(error) => tracing::error!(%error, "a TLS handshake ended early"),
                },
                (stream, peer) = Listener::accept(&mut self.listener), if room => {
                    self.shake(stream, peer);
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertifiedKey, generate_simple_self_signed};

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let make = || generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (CertifiedKey { cert, signing_key }, other) = (make(), make());
        let certificate = write(dir.path(), "cert.pem", &cert.pem());
        let key = write(dir.path(), "key.pem", &signing_key.serialize_pem());
        let foreign = write(dir.path(), "other.pem", &other.signing_key.serialize_pem());
        let nothing = write(dir.path(), "nothing.pem", "no PEM\n");
        let absent = dir.path().join("absent.pem");
        let load = |certificate: &PathBuf, key: &PathBuf| {
            TlsConfig { certificate: certificate.clone(), key: key.clone() }.load()
        };
        assert!(load(&certificate, &key).is_ok());
        let text = load(&certificate, &foreign).unwrap_err().to_string();
        assert!(text.contains("other.pem does not belong to the certificate"), "{text}");
        let error = load(&certificate, &nothing).unwrap_err();
        assert!(matches!(error, TlsError::Key { .. }), "{error}");
        let error = load(&nothing, &key).unwrap_err();
        assert!(matches!(error, TlsError::NoCertificate { .. }), "{error}");
        let error = load(&absent, &key).unwrap_err();
        assert!(error.to_string().contains("absent.pem"), "{error}");
        assert!(matches!(load(&key, &key).unwrap_err(), TlsError::NoCertificate { .. }));
    }
}
