//! Asks control over HTTP: the token, answers and problems. What is asked is the commands' business.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;
use ureq::Agent;
use ureq::http::{Request, Response};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

/// How long control may take to answer: it closes windows of a group in ten.
const ANSWER: Duration = Duration::from_secs(60);

/// What a segment of a path may have as it is (RFC 3986).
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{} holds no certificate, expected one in PEM form", path.display())]
    Certificate { path: PathBuf },
    #[error("the token is not set, expected it in MOEPLANE_TOKEN or a file as --token-file")]
    NoToken,
    #[error("{what} is not set, expected {expected}")]
    Missing { what: &'static str, expected: String },
    #[error("{what} is {value}, expected {expected}")]
    Value { what: &'static str, value: String, expected: &'static str },
    #[error("control at {url} is not reached")]
    Reach { url: String, source: ureq::Error },
    #[error("control at {url} answers what is not understood")]
    Answer { url: String, source: Option<serde_json::Error> },
    #[error("{title}")]
    Refused { status: u16, title: String },
    #[error("the answer cannot be printed")]
    Print(#[from] io::Error),
}

impl Failed {
    /// 1: trying again may help; 2: the request must change; 3: the token must; 64: the command line.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoToken | Self::Refused { status: 401 | 403, .. } => 3,
            Self::Refused { status: 429 | 500.., .. } => 1,
            Self::Refused { .. } => 2,
            Self::Missing { .. }
            | Self::Value { .. }
            | Self::Read { .. }
            | Self::Certificate { .. } => settings::BAD_CONFIG,
            _ => 1,
        }
    }
}

/// A path of the API, every segment of it escaped.
pub(crate) fn path(segments: &[&str]) -> String {
    let escaped = segments.iter().map(|segment| utf8_percent_encode(segment, SEGMENT).to_string());
    format!("/api/v1/{}", escaped.collect::<Vec<_>>().join("/"))
}

/// A parameter of a query, escaped.
pub(crate) fn parameter(name: &str, value: &str) -> String {
    format!("{name}={}", utf8_percent_encode(value, SEGMENT))
}

/// Control, as one who has a token.
pub(crate) struct Client {
    agent: Agent,
    url: String,
    token: String,
}

impl Client {
    /// `ca` is a file with the certificates of those who vouch for control; without, it is the system's.
    pub(crate) fn new(url: &str, token: String, ca: Option<&Path>) -> Result<Self, Failed> {
        let tls = match ca {
            Some(ca) => TlsConfig::builder().root_certs(roots(ca)?).build(),
            None => TlsConfig::default(),
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .tls_config(tls)
            .timeout_global(Some(ANSWER))
            .user_agent(concat!("moeplane/", env!("CARGO_PKG_VERSION")));
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { agent: Agent::new_with_config(config.build()), url, token })
    }

    /// What a GET answers.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failed> {
        self.parsed(&self.text(path)?)
    }

    /// The text that a GET answers.
    pub(crate) fn text(&self, path: &str) -> Result<String, Failed> {
        self.answer(self.request("GET", path).body(String::new()))
    }

    /// The bytes that a GET answers.
    pub(crate) fn bytes(&self, path: &str) -> Result<Vec<u8>, Failed> {
        self.answer_bytes(self.request("GET", path).body(String::new()))
    }

    /// What a POST of JSON answers.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, Failed> {
        self.send("POST", path, body)
    }

    /// What a PUT of JSON answers.
    pub(crate) fn put(&self, path: &str, body: &Value) -> Result<Value, Failed> {
        self.send("PUT", path, body)
    }

    /// What a POST of a component answers, `path` having the reason.
    pub(crate) fn upload(&self, path: &str, component: &[u8]) -> Result<Value, Failed> {
        let request = self.request("POST", path).header("content-type", "application/wasm");
        self.parsed(&self.answer(request.body(component))?)
    }

    fn send(&self, method: &str, path: &str, body: &Value) -> Result<Value, Failed> {
        let request = self.request(method, path).header("content-type", "application/json");
        self.parsed(&self.answer(request.body(body.to_string()))?)
    }

    fn request(&self, method: &str, path: &str) -> ureq::http::request::Builder {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {}", self.token))
    }

    fn answer(
        &self,
        request: Result<Request<impl ureq::AsSendBody>, ureq::http::Error>,
    ) -> Result<String, Failed> {
        let bytes = self.answer_bytes(request)?;
        let failed = || Failed::Answer { url: self.url.clone(), source: None };
        String::from_utf8(bytes).map_err(|_no_text| failed())
    }

    fn answer_bytes(
        &self,
        request: Result<Request<impl ureq::AsSendBody>, ureq::http::Error>,
    ) -> Result<Vec<u8>, Failed> {
        let reach = |source| Failed::Reach { url: self.url.clone(), source };
        let request = request.map_err(|error| reach(error.into()))?;
        let mut answer: Response<ureq::Body> = self.agent.run(request).map_err(reach)?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(u64::MAX);
        let bytes = body.read_to_vec().map_err(reach)?;
        if (200..300).contains(&status) {
            return Ok(bytes);
        }
        let problem = self.parsed(&String::from_utf8_lossy(&bytes))?;
        let title = problem["title"].as_str().unwrap_or("control refuses").to_owned();
        Err(Failed::Refused { status, title })
    }

    fn parsed(&self, text: &str) -> Result<Value, Failed> {
        let failed = |source| Failed::Answer { url: self.url.clone(), source: Some(source) };
        serde_json::from_str(text).map_err(failed)
    }
}

fn roots(path: &Path) -> Result<RootCerts, Failed> {
    let path = path.to_owned();
    let pem = match fs::read(&path) {
        Ok(pem) => pem,
        Err(source) => return Err(Failed::Read { path, source }),
    };
    let certificates = parse_pem(&pem).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    let certificates: Vec<_> = certificates.collect();
    if certificates.is_empty() {
        return Err(Failed::Certificate { path });
    }
    Ok(RootCerts::new_with_certs(&certificates))
}
