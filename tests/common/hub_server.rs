//! A Hugging Face hub on the loopback address: its API, a storage on another port where it keeps large files, and the
//! faults that networks have.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that every branch of every repository is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files from this size on are stored as large ones, behind a redirect to the storage.
pub const LARGE: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Model,
    Dataset,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "each test file uses some of them")]
pub enum Fault {
    /// This status, with the hub's own name for the fault.
    Status(u16, &'static str),
    /// Too many requests, with a wish for a wait of so many seconds.
    RetryAfter(u64),
    /// The connection breaks after so many bytes of the body.
    Cut(usize),
    /// One bit of the body is wrong.
    Garbled,
    /// Fewer bytes come than were asked for, and nothing says so.
    Short,
    /// More bytes come than were asked for.
    Long,
    /// Bytes without an end come.
    Endless,
    /// A listing goes on where it began.
    Again,
    /// A listing goes on at another host.
    GoesOnElsewhere,
    /// A redirect to where it came from.
    Circle,
    /// A redirect to another host.
    Elsewhere,
}

/// What a client asked for.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    /// With the query; `storage:` stands before what went to the storage.
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    body: Vec<u8>,
}

struct File {
    kind: Kind,
    repo: String,
    path: String,
    bytes: Arc<Vec<u8>>,
}

#[derive(Default)]
struct State {
    storage_url: String,
    files: Vec<File>,
    /// Repositories that only this token may read.
    gates: Vec<(String, String)>,
    /// Part of a path, what happens to a request for it, and how often still.
    faults: Vec<(String, Fault, usize)>,
    requests: Vec<Request>,
    page_size: Option<usize>,
}

pub struct HubServer {
    /// What `HF_ENDPOINT` must be.
    pub url: String,
    state: Arc<Mutex<State>>,
}

#[allow(dead_code, reason = "each test file uses some of them")]
impl HubServer {
    /// Serves until the process ends.
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let storage = serve("storage:", Arc::clone(&state));
        let url = serve("", Arc::clone(&state));
        state.lock().unwrap().storage_url = storage;
        Self { url, state }
    }

    pub fn add_file(&self, kind: Kind, repo: &str, path: &str, bytes: impl Into<Vec<u8>>) {
        let file = File { kind, repo: repo.into(), path: path.into(), bytes: Arc::new(bytes.into()) };
        self.state.lock().unwrap().files.push(file);
    }

    /// Files of `repo` are given out only with `token`.
    pub fn gate(&self, repo: &str, token: &str) {
        self.state.lock().unwrap().gates.push((repo.into(), token.into()));
    }

    /// The next `times` requests whose path, or range behind it, contains `part` meet `fault`.
    pub fn fail(&self, part: &str, fault: Fault, times: usize) {
        self.state.lock().unwrap().faults.push((part.into(), fault, times));
    }

    /// Listings come in pages of `size` entries.
    pub fn paginate(&self, size: usize) {
        self.state.lock().unwrap().page_size = Some(size);
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().unwrap().requests.clone()
    }
}

/// Listens on a free port; gives the URL. `name` is put before the paths in the log.
fn serve(name: &'static str, state: Arc<Mutex<State>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let own_url = url.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (state, url) = (Arc::clone(&state), own_url.clone());
            // A client that hangs up is no fault of the server.
            thread::spawn(move || answer(name, &url, stream, &state).ok());
        }
    });
    url
}

struct Response {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Response {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into() }
    }

    fn json(value: &Value) -> Self {
        Self::new(200, value.to_string())
    }

    fn error(status: u16, code: &str) -> Self {
        Self::new(status, json!({ "error": format!("{status} {code}") }).to_string()).with("X-Error-Code", code)
    }

    fn with(mut self, header: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((header, value.into()));
        self
    }
}

fn answer(name: &str, url: &str, mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut request = read(&stream)?;
    let path = std::mem::take(&mut request.path);
    request.path = format!("{name}{path}");
    let (mut response, fault) = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        let place = format!("{} {}", request.path, request.range.as_deref().unwrap_or_default());
        let fault = state.faults.iter_mut().find(|(part, _, times)| *times > 0 && place.contains(part.as_str()));
        let fault = fault.map(|(_, fault, times)| {
            *times -= 1;
            *fault
        });
        let response = match fault {
            Some(Fault::Circle) => Response::new(302, "").with("Location", format!("{url}{path}")),
            Some(Fault::Elsewhere) => Response::new(302, "").with("Location", format!("{}{path}", state.storage_url)),
            _ if name.is_empty() => state.hub(url, &request),
            _ => state.storage(&request, &path),
        };
        (response, fault)
    };
    let mut cut = None;
    match fault {
        Some(Fault::Status(status, code)) => response = Response::error(status, code),
        Some(Fault::RetryAfter(seconds)) => {
            response = Response::error(429, "").with("Retry-After", seconds.to_string());
        }
        Some(Fault::Cut(bytes)) => cut = Some(bytes),
        Some(Fault::Garbled) if request.method == "GET" => {
            if let Some(byte) = response.body.first_mut() {
                *byte ^= 1;
            }
        }
        Some(Fault::Short) if request.method == "GET" => drop(response.body.pop()),
        Some(Fault::Long) if request.method == "GET" => response.body.extend([0; 100]),
        Some(Fault::Again) => response = response.with("Link", format!("<{url}{path}>; rel=\"next\"")),
        Some(Fault::GoesOnElsewhere) => {
            let elsewhere = state.lock().unwrap().storage_url.clone();
            response = response.with("Link", format!("<{elsewhere}{path}>; rel=\"next\""));
        }
        _ => {}
    }

    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", response.status);
    for (header, value) in &response.headers {
        head += &format!("{header}: {value}\r\n");
    }
    if let Some(Fault::Endless) = fault {
        stream.write_all((head + "\r\n").as_bytes())?;
        loop {
            stream.write_all(&[b' '; 1 << 16])?;
        }
    }
    head += &format!("Content-Length: {}\r\n\r\n", response.body.len());
    stream.write_all(head.as_bytes())?;
    if request.method != "HEAD" {
        let body = &response.body;
        stream.write_all(&body[..cut.unwrap_or(body.len()).min(body.len())])?;
    }
    stream.flush()
}

fn read(stream: &TcpStream) -> std::io::Result<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path, range: None, authorization: None, body: Vec::new() };
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((header, value)) = line.trim_end().split_once(": ") else { break };
        match header.to_lowercase().as_str() {
            "range" => request.range = Some(value.into()),
            "authorization" => request.authorization = Some(value.into()),
            "content-length" => length = value.parse().unwrap_or(0),
            _ => {}
        }
    }
    request.body.resize(length, 0);
    reader.read_exact(&mut request.body)?;
    Ok(request)
}

impl State {
    fn hub(&self, url: &str, request: &Request) -> Response {
        let (path, query) = request.path.split_once('?').unwrap_or((&request.path, ""));
        let path = decode(path);
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        match parts[..] {
            ["api", kind, owner, name, "revision", revision] => {
                self.in_repo(kind, owner, name, revision, |_| json!({ "id": format!("{owner}/{name}"), "sha": COMMIT }))
            }
            ["api", kind, owner, name, "paths-info", revision] => self.in_repo(kind, owner, name, revision, |files| {
                // A redirect has made a request without a body of it.
                let asked: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let is_asked =
                    |file: &&&File| asked["paths"].as_array().is_some_and(|it| it.contains(&json!(file.path)));
                files.iter().filter(is_asked).map(|file| file.entry()).collect()
            }),
            ["api", kind, owner, name, "tree", revision, ref folder @ ..] => {
                let folder = folder.join("/");
                let inside = |file: &&&File| folder.is_empty() || file.path.starts_with(&format!("{folder}/"));
                let mut response = self.in_repo(kind, owner, name, revision, |files| {
                    files.iter().filter(inside).map(|file| file.entry()).collect()
                });
                if let (Some(size), Ok(Value::Array(entries))) =
                    (self.page_size, serde_json::from_slice(&response.body))
                {
                    let start: usize = query.split_once("cursor=").map_or(0, |(_, at)| at.parse().unwrap());
                    let end = entries.len().min(start + size);
                    response = Response::json(&json!(entries[start..end]));
                    if end < entries.len() {
                        let next = format!("<{url}{path}?recursive=true&cursor={end}>; rel=\"next\"");
                        response = response.with("Link", next);
                    }
                }
                response
            }
            ["datasets", owner, name, "resolve", _, ref file @ ..] => {
                self.resolve(Kind::Dataset, &format!("{owner}/{name}"), &file.join("/"), request)
            }
            [owner, name, "resolve", _, ref file @ ..] => {
                self.resolve(Kind::Model, &format!("{owner}/{name}"), &file.join("/"), request)
            }
            _ => Response::error(404, ""),
        }
    }

    fn in_repo(
        &self,
        kind: &str,
        owner: &str,
        name: &str,
        revision: &str,
        answer: impl FnOnce(&[&File]) -> Value,
    ) -> Response {
        let kind = if kind == "datasets" { Kind::Dataset } else { Kind::Model };
        let repo = format!("{owner}/{name}");
        let files: Vec<&File> = self.files.iter().filter(|file| file.kind == kind && file.repo == repo).collect();
        if files.is_empty() {
            return Response::error(401, "RepoNotFound");
        }
        if revision != "main" && revision != COMMIT {
            return Response::error(404, "RevisionNotFound");
        }
        Response::json(&answer(&files))
    }

    fn resolve(&self, kind: Kind, repo: &str, path: &str, request: &Request) -> Response {
        let token = request.authorization.as_deref().and_then(|value| value.strip_prefix("Bearer "));
        if let Some((_, right)) = self.gates.iter().find(|(gated, _)| gated == repo)
            && token != Some(right)
        {
            return Response::error(if token.is_some() { 403 } else { 401 }, "GatedRepo");
        }
        let file = self.files.iter().find(|file| file.kind == kind && file.repo == repo && file.path == path);
        let Some(file) = file else { return Response::error(404, "EntryNotFound") };
        if file.bytes.len() < LARGE {
            return ranged(file, request).with("X-Repo-Commit", COMMIT);
        }
        let sha256 = file.sha256();
        Response::new(302, "")
            .with("Location", format!("{}/{sha256}", self.storage_url))
            .with("X-Repo-Commit", COMMIT)
            .with("X-Linked-Etag", format!("\"{sha256}\""))
            .with("X-Linked-Size", file.bytes.len().to_string())
    }

    fn storage(&self, request: &Request, path: &str) -> Response {
        let file = self.files.iter().find(|file| path.trim_matches('/') == file.sha256());
        file.map_or_else(|| Response::error(404, ""), |file| ranged(file, request))
    }
}

fn ranged(file: &File, request: &Request) -> Response {
    let bytes = &file.bytes;
    let range = request.range.as_deref().and_then(|range| range.strip_prefix("bytes="));
    let response = match range.and_then(|range| range.split_once('-')) {
        Some((start, end)) => {
            let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
            Response::new(206, &bytes[start..=end])
                .with("Content-Range", format!("bytes {start}-{end}/{}", bytes.len()))
        }
        None => Response::new(200, bytes.to_vec()),
    };
    response.with("ETag", format!("\"{}\"", file.git_id())).with("Accept-Ranges", "bytes")
}

impl File {
    fn entry(&self) -> Value {
        let mut entry = json!({ "type": "file", "oid": self.git_id(), "size": self.bytes.len(), "path": self.path });
        if self.bytes.len() >= LARGE {
            entry["lfs"] =
                json!({ "oid": self.sha256(), "size": self.bytes.len(), "pointerSize": self.pointer().len() });
        }
        entry
    }

    fn sha256(&self) -> String {
        Sha256::digest(&**self.bytes).iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn pointer(&self) -> String {
        let version = "version https://git-lfs.github.com/spec/v1";
        format!("{version}\noid sha256:{}\nsize {}\n", self.sha256(), self.bytes.len())
    }

    /// The id of the blob that git holds: a large file's pointer, or the file.
    fn git_id(&self) -> String {
        let blob = if self.bytes.len() < LARGE { self.bytes.to_vec() } else { self.pointer().into_bytes() };
        let mut sha1 = Sha1::new();
        sha1.update(format!("blob {}\0", blob.len()));
        sha1.update(&blob);
        sha1.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Undoes `%20` and its like.
fn decode(path: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let code: Vec<u8> = bytes.by_ref().take(2).collect();
            out.push(u8::from_str_radix(std::str::from_utf8(&code).unwrap(), 16).unwrap());
        } else {
            out.push(byte);
        }
    }
    String::from_utf8(out).unwrap()
}
