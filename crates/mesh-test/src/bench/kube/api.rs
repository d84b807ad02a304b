// SPDX-License-Identifier: Apache-2.0
//! A client for thousands of API server requests: HTTP through `kubectl proxy`, one connection per
//! writer. One kubectl process per object would take hours.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::kube::Kube;
use crate::process::{Host, Proc};

/// Timeout of a request.
const ANSWER: Duration = Duration::from_secs(60);
/// Deadline for `kubectl proxy` to listen.
const LISTENS: Duration = Duration::from_secs(20);
/// Number of concurrent writers while the cluster is filled.
const WRITERS: usize = 16;

/// A running `kubectl proxy`.
#[derive(Debug)]
pub(super) struct Proxy<'k> {
    host: &'k Host,
    address: SocketAddr,
    #[expect(dead_code, reason = "held for its drop")]
    kubectl: Proc,
}

/// The kind of write.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    /// POST of a new object.
    Create,
    /// A JSON merge patch.
    Merge,
    /// DELETE with a grace period of 0.
    Delete,
}

/// A write request to the API server.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) verb: Verb,
    pub(super) path: String,
    pub(super) body: Value,
}

impl Request {
    pub(super) fn create(path: impl Into<String>, body: Value) -> Self {
        let path = path.into();
        Self {
            verb: Verb::Create,
            path,
            body,
        }
    }

    pub(super) fn merge(path: impl Into<String>, body: Value) -> Self {
        let path = path.into();
        Self {
            verb: Verb::Merge,
            path,
            body,
        }
    }
}

impl<'k> Proxy<'k> {
    pub(super) fn start(kube: &'k Kube) -> Result<Self> {
        let host = kube.host();
        let kubectl = host.spawn_lines(kube.kubectl_cmd(["proxy", "--port=0"])?)?;
        let line = kubectl.line(LISTENS)?.context("kubectl proxy exited")?;
        let address = line.rsplit(' ').next().unwrap_or_default().parse();
        let address = address.with_context(|| line)?;
        Ok(Self {
            host,
            address,
            kubectl,
        })
    }

    /// Opens a new connection to the proxy.
    pub(super) fn connect(&self) -> Result<Api> {
        let stream = self.host.in_ns(|| Ok(TcpStream::connect(self.address)?))?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_nodelay(true)?;
        Ok(Api {
            host: self.address.to_string(),
            stream: BufReader::new(stream),
        })
    }

    /// Sends the requests over several connections concurrently, in no particular order.
    pub(super) fn send_all(&self, requests: &[Request]) -> Result<()> {
        let share = requests.len().div_ceil(WRITERS).max(1);
        std::thread::scope(|scope| {
            let threads: Vec<_> = requests
                .chunks(share)
                .map(|share| {
                    scope.spawn(move || -> Result<()> {
                        let mut api = self.connect()?;
                        share
                            .iter()
                            .try_for_each(|request| api.send(request).map(drop))
                    })
                })
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| match thread.join() {
                    Ok(sent) => sent,
                    Err(panic) => std::panic::resume_unwind(panic),
                })
        })
    }
}

/// A connection to the API server through the proxy.
#[derive(Debug)]
pub(super) struct Api {
    host: String,
    stream: BufReader<TcpStream>,
}

impl Api {
    /// Sends one request and returns the object in the response.
    pub(super) fn send(&mut self, request: &Request) -> Result<Value> {
        let (method, kind) = match request.verb {
            Verb::Create => ("POST", "application/json"),
            Verb::Merge => ("PATCH", "application/merge-patch+json"),
            Verb::Delete => ("DELETE", "application/json"),
        };
        let body = request.body.to_string();
        write!(
            self.stream.get_mut(),
            "{method} {} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            request.path,
            self.host,
            body.len(),
        )?;
        let (code, answer) = self
            .answer()
            .with_context(|| format!("{method} {}", request.path))?;
        if code >= 300 {
            bail!(
                "{method} {}: {code}: {}",
                request.path,
                String::from_utf8_lossy(&answer)
            );
        }
        Ok(serde_json::from_slice(&answer)?)
    }

    fn answer(&mut self) -> Result<(u16, Vec<u8>)> {
        let status = self.line()?;
        let code = status
            .split(' ')
            .nth(1)
            .context("no status code")?
            .parse()?;
        let mut length = None;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            let Some((name, value)) = line.split_once(':') else {
                break;
            };
            if name == "content-length" {
                length = Some(value.trim().parse()?);
            }
        }
        let mut body = Vec::new();
        match length {
            Some(length) => {
                body.resize(length, 0);
                self.stream.read_exact(&mut body)?;
            }
            None => self.chunks(&mut body)?,
        }
        Ok((code, body))
    }

    /// Reads a chunked body (RFC 9112, section 7.1) without extensions or trailers.
    fn chunks(&mut self, body: &mut Vec<u8>) -> Result<()> {
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).context("invalid chunk size")?;
            let start = body.len();
            body.resize(start + size, 0);
            self.stream.read_exact(&mut body[start..])?;
            self.line()?;
            if size == 0 {
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let line = line
            .strip_suffix("\r\n")
            .context("the connection closed early")?;
        Ok(line.to_owned())
    }
}
