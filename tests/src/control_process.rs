//! The control plane as a child process: ready when its address can be read, ended when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use crate::worker_process::{program, until};

/// A running control plane.
#[derive(Debug)]
pub struct Control {
    child: Child,
    address: String,
    options: Vec<String>,
    /// The admin's.
    token: String,
    /// Who vouches for it, if it has TLS.
    ca: Option<PathBuf>,
    /// Its data folder, and the log.
    folder: TempDir,
}

/// Heartbeats that let tests see soon who is lost, and windows that they can wait for.
const QUICK: [&str; 4] = ["--window-ms", "300", "--heartbeat-ms", "200"];

impl Control {
    /// Starts control on an empty folder and waits until it listens, in a hurry.
    pub fn start() -> Result<Self> {
        Self::start_with(&QUICK)
    }

    /// The same, but workers that say nothing are not soon lost.
    pub fn start_patient() -> Result<Self> {
        Self::start_with(&["--window-ms", "300", "--heartbeat-ms", "60000"])
    }

    /// The same, with a file for the placement of the group `g`.
    pub fn start_placing(file: &Path) -> Result<Self> {
        Self::start_with(&[&QUICK[..], &["--placement", &format!("g={}", file.display())]].concat())
    }

    /// The same, with TLS by a certificate of 127.0.0.1 that vouches for itself.
    pub fn start_tls(certificate: &Path, key: &Path) -> Result<Self> {
        let [certificate_path, key] = [certificate, key].map(|path| path.display().to_string());
        let tls = ["--tls-certificate", &certificate_path, "--tls-key", &key];
        let mut control = Self::start_with(&[&QUICK[..], &tls].concat())?;
        control.ca = Some(certificate.to_owned());
        Ok(control)
    }

    /// The same, with options of its own.
    pub fn start_with(options: &[&str]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("moe-control").tempdir()?;
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let token = init(&folder.path().join("data"), &[])?;
        let child = Self::child(folder.path(), "127.0.0.1:0", &options)?;
        let mut control = Self { child, address: String::new(), options, token, ca: None, folder };
        control.ready()?;
        Ok(control)
    }

    /// Starts another process on the same folder at the same address, after the first has ended; `more`
    /// options take the place of its placements.
    pub fn restart(&mut self, more: &[&str]) -> Result<()> {
        // A process that was killed leaves the file.
        match fs::remove_file(self.data().join("address")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        self.options.truncate(QUICK.len());
        self.options.extend(more.iter().map(|&option| option.to_owned()));
        self.child = Self::child(self.folder.path(), &self.address, &self.options)?;
        self.ready()
    }

    fn child(folder: &Path, listen: &str, options: &[String]) -> Result<Child> {
        Command::new(program("moeplane-control")?)
            .args(["serve", "--exit-with-parent"])
            .args(options)
            .args(["--listen", listen, "--data"])
            .arg(folder.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::options().create(true).append(true).open(folder.join("log"))?)
            .spawn()
            .context("control did not start")
    }

    fn ready(&mut self) -> Result<()> {
        let path = self.data().join("address");
        let address = until("the address of control", || {
            if self.child.try_wait()?.is_some() {
                bail!("control ended: {}", self.log().trim_end());
            }
            Ok(fs::read_to_string(&path).ok())
        })?;
        address.trim().clone_into(&mut self.address);
        Ok(())
    }

    /// Its data folder.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Options by which a worker finds it.
    #[must_use]
    pub fn options(&self) -> Vec<String> {
        let credential = self.data().join("worker-credential").display().to_string();
        let scheme = if self.ca.is_some() { "wss" } else { "ws" };
        let url = format!("{scheme}://{}", self.address);
        let mut options =
            ["--control", &url, "--credential", &credential].map(str::to_owned).to_vec();
        if let Some(ca) = &self.ca {
            options.extend(["--control-ca".to_owned(), ca.display().to_string()]);
        }
        options
    }

    /// HOST:PORT.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The process number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The admin, asking over connections that stay open.
    pub fn client(&self) -> Result<Client<'_>> {
        Ok(Client { control: self, agent: self.agent()? })
    }

    /// The admin's token.
    #[must_use]
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Status and body of a GET by the admin; null for a body that is no JSON.
    pub fn get(&self, path: &str) -> Result<(u16, Value)> {
        let (status, text) = self.send("GET", path, Some(&self.token), None)?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// The text of a GET by the admin.
    pub fn text(&self, path: &str) -> Result<String> {
        Ok(self.send("GET", path, Some(&self.token), None)?.1)
    }

    /// Status and tag of a GET by who has what `tag` says.
    pub fn get_unless(&self, path: &str, tag: &str) -> Result<(u16, String)> {
        let request = self.agent()?.get(self.url(path)).header("if-none-match", tag);
        let request = request.header("authorization", format!("Bearer {}", self.token));
        let response = request.call()?;
        let tag = response.headers().get("etag").context("no tag")?.to_str()?;
        Ok((response.status().as_u16(), tag.to_owned()))
    }

    /// Status and body of a POST by the admin, for a reason.
    pub fn post(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        self.change("POST", path, body)
    }

    /// Status and body of a PUT by the admin, for a reason.
    pub fn put(&self, path: &str, body: &Value) -> Result<(u16, Value)> {
        self.change("PUT", path, body)
    }

    fn change(&self, method: &str, path: &str, body: &Value) -> Result<(u16, Value)> {
        let mut body = body.clone();
        body["reason"] = "a test".into();
        let (status, text) = self.send(method, path, Some(&self.token), Some(&body.to_string()))?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Status and body of a POST of a component by the admin.
    pub fn upload(&self, path: &str, component: &[u8]) -> Result<(u16, Value)> {
        let request = ureq::http::Request::builder().method("POST").uri(self.url(path));
        let request = request.header("authorization", format!("Bearer {}", self.token));
        let request = request.header("content-type", "application/wasm");
        let mut response = self.agent()?.run(request.body(component)?)?;
        let text = response.body_mut().read_to_string()?;
        Ok((response.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// Status and text of any request; a body is JSON, or said to be. Streams of events have no text.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: Option<&str>,
    ) -> Result<(u16, String)> {
        let mut request = ureq::http::Request::builder().method(method).uri(self.url(path));
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let mut response = self.agent()?.run(request.body(body.unwrap_or_default().to_owned())?)?;
        let stream =
            response.headers().get("content-type").is_some_and(|t| t == "text/event-stream");
        let text = if stream { String::new() } else { response.body_mut().read_to_string()? };
        Ok((response.status().as_u16(), text))
    }

    /// Status and text of a request by the admin with an idempotency key and a body of JSON.
    pub fn send_keyed(
        &self,
        method: &str,
        path: &str,
        (key, body): (&str, &str),
    ) -> Result<(u16, String)> {
        let request = ureq::http::Request::builder().method(method).uri(self.url(path));
        let request = request.header("authorization", format!("Bearer {}", self.token));
        let request = request.header("content-type", "application/json");
        let request = request.header("idempotency-key", key);
        let mut response = self.agent()?.run(request.body(body.to_owned())?)?;
        Ok((response.status().as_u16(), response.body_mut().read_to_string()?))
    }

    fn url(&self, path: &str) -> String {
        let scheme = if self.ca.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.address)
    }

    fn agent(&self) -> Result<ureq::Agent> {
        let mut config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .allow_non_standard_methods(true);
        if let Some(ca) = &self.ca {
            let certificate = Certificate::from_pem(&fs::read(ca)?)?;
            let roots = RootCerts::new_with_certs(&[certificate]);
            config = config.tls_config(TlsConfig::builder().root_certs(roots).build());
        }
        Ok(ureq::Agent::new_with_config(config.build()))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        Ok(kill_process(pid.context("no such process")?, signal)?)
    }

    /// Waits for the process to end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        until("the end of control", || Ok(self.child.try_wait()?))
    }
}

/// One who asks again and again.
#[derive(Debug)]
pub struct Client<'a> {
    control: &'a Control,
    agent: ureq::Agent,
}

impl Client<'_> {
    /// How long the whole answer to a GET takes, which must be good.
    pub fn time(&self, path: &str) -> Result<Duration> {
        let request = self.agent.get(self.control.url(path));
        let request = request.header("authorization", format!("Bearer {}", self.control.token));
        let began = Instant::now();
        let mut response = request.call()?;
        let text = response.body_mut().with_config().limit(u64::MAX).read_to_string()?;
        let took = began.elapsed();
        ensure!(response.status() == 200, "{path}: {} {text}", response.status());
        Ok(took)
    }
}

/// The first admin token of a data folder.
pub fn init(data: &Path, options: &[&str]) -> Result<String> {
    let mut init = Command::new(program("moeplane-control")?);
    let done = init.arg("init").arg("--data").arg(data).args(options).output()?;
    let said = String::from_utf8_lossy(&done.stderr).trim().to_owned();
    ensure!(done.status.success(), "{}: {said}", done.status);
    Ok(String::from_utf8(done.stdout)?.trim().to_owned())
}

impl Drop for Control {
    fn drop(&mut self) {
        // There is nobody to report a failure to: it may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
