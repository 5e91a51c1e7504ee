//! A blocking HTTP/1.1 client, as small as the tests allow.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// Longer than any response takes; turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// The server's address and the API key.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub address: SocketAddr,
    pub key: Option<String>,
}

/// A complete response.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// A response whose body has not been read yet.
pub(crate) struct Stream {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    reader: BufReader<TcpStream>,
    framing: Framing,
}

enum Framing {
    Length(usize),
    Chunked,
    Close,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, key: None }
    }

    pub(crate) fn with_key(&self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self.clone() }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "application/json", b"").expect("the server answers")
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        self.ask("DELETE", path, "application/json", b"").expect("the server answers")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).expect("the server answers")
    }

    pub(crate) fn try_post(&self, path: &str, body: &Value) -> std::io::Result<Answer> {
        self.ask("POST", path, "application/json", body.to_string().as_bytes())
    }

    /// `multipart/form-data` with text fields and files (field name = file name).
    pub(crate) fn upload(
        &self,
        path: &str,
        texts: &[(&str, &str)],
        files: &[(&str, &[u8])],
    ) -> Answer {
        const EDGE: &str = "edge-of-a-part";
        let mut body = Vec::new();
        for (name, text) in texts {
            let part = format!(
                "--{EDGE}\r\ncontent-disposition: form-data; name=\"{name}\"\r\n\r\n{text}\r\n"
            );
            body.extend_from_slice(part.as_bytes());
        }
        for (name, bytes) in files {
            let head = format!(
                "--{EDGE}\r\ncontent-disposition: form-data; name=\"file\"; \
                 filename=\"{name}\"\r\ncontent-type: application/octet-stream\r\n\r\n"
            );
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(bytes);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(format!("--{EDGE}--\r\n").as_bytes());
        let kind = format!("multipart/form-data; boundary={EDGE}");
        self.ask("POST", path, &kind, &body).expect("the server answers")
    }

    /// Starts a streaming request, and reads the head of the response.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        let body = body.to_string();
        self.open("POST", path, "application/json", body.as_bytes()).expect("the server answers")
    }

    pub(crate) fn open(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> std::io::Result<Stream> {
        let socket = TcpStream::connect(self.address)?;
        self.open_on(socket, method, path, kind, body)
    }

    /// As [`Client::open`], on an existing connection.
    pub(crate) fn open_on(
        &self,
        mut socket: TcpStream,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> std::io::Result<Stream> {
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_nodelay(true)?;
        let key = self.key.as_ref().map(|key| format!("authorization: Bearer {key}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: {kind}\r\n\
             content-length: {}\r\n{}\r\n",
            self.address,
            body.len(),
            key.unwrap_or_default()
        );
        socket.write_all(head.as_bytes())?;
        socket.write_all(body)?;
        Stream::read_head(BufReader::new(socket))
    }

    fn ask(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> std::io::Result<Answer> {
        self.open(method, path, kind, body)?.whole()
    }
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("the body is JSON ({error}): {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.as_str())
    }

    /// The response's JSON. Panics if the status is not a success.
    pub(crate) fn good(&self) -> Value {
        assert!((200..300).contains(&self.status), "{}: {}", self.status, self.body);
        self.json()
    }

    /// The error's message. Panics if the response has another status or not OpenAI's error format.
    pub(crate) fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{}", self.body);
        error_message(&self.json())
    }
}

/// The message of an error in OpenAI's format.
pub(crate) fn error_message(body: &Value) -> String {
    let error = &body["error"];
    for field in ["message", "type", "param", "code"] {
        assert!(error.get(field).is_some(), "an error has the field {field}: {body}");
    }
    let message = error["message"].as_str().expect("the message is text");
    assert!(!message.is_empty() && error["type"].is_string(), "{body}");
    message.to_owned()
}

impl Stream {
    fn read_head(mut reader: BufReader<TcpStream>) -> std::io::Result<Self> {
        let broken = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.ok_or_else(broken)?;
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Err(broken());
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let find = |wanted: &str| headers.iter().find(|(name, _)| name == wanted);
        let framing = match (find("transfer-encoding"), find("content-length")) {
            (Some(_), _) => Framing::Chunked,
            (None, Some((_, length))) => Framing::Length(length.parse().map_err(|_| broken())?),
            (None, None) => Framing::Close,
        };
        Ok(Self { status, headers, reader, framing })
    }

    /// The next part of the body as it was received; `None` at its proper end.
    fn piece(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        let length = match self.framing {
            Framing::Length(0) => return Ok(None),
            Framing::Length(length) => length,
            Framing::Close => {
                let mut rest = Vec::new();
                self.reader.read_to_end(&mut rest)?;
                return Ok((!rest.is_empty()).then_some(rest));
            }
            Framing::Chunked => {
                let mut line = String::new();
                self.reader.read_line(&mut line)?;
                usize::from_str_radix(line.trim(), 16)
                    .map_err(|_| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?
            }
        };
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes)?;
        if matches!(self.framing, Framing::Chunked) {
            self.reader.read_exact(&mut [0; 2])?;
            return Ok((length > 0).then_some(bytes));
        }
        self.framing = Framing::Length(0);
        Ok(Some(bytes))
    }

    /// Reads the rest of the body.
    pub(crate) fn whole(mut self) -> std::io::Result<Answer> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece()? {
            body.extend(piece);
        }
        let body = String::from_utf8_lossy(&body).into_owned();
        Ok(Answer { status: self.status, headers: self.headers, body })
    }

    /// The remaining server-sent events, each as the text after `data: `.
    pub(crate) fn events(self) -> Events {
        if self.status != 200 {
            panic!("the stream is refused: {:?}", self.whole());
        }
        Events { stream: self, pending: Vec::new(), over: false }
    }
}

/// Iterates over the data of server-sent events; comments are skipped. If the connection breaks,
/// the last item is an error.
pub(crate) struct Events {
    stream: Stream,
    pending: Vec<u8>,
    over: bool,
}

impl Iterator for Events {
    type Item = std::io::Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(end) = self.pending.windows(2).position(|bytes| bytes == b"\n\n") {
                let event: Vec<u8> = self.pending.drain(..end + 2).collect();
                let event = String::from_utf8(event).expect("events are UTF-8");
                match event.trim_end().strip_prefix("data: ") {
                    Some(data) => return Some(Ok(data.to_owned())),
                    None => continue,
                }
            }
            if self.over {
                assert!(self.pending.is_empty(), "the stream ends with a whole event");
                return None;
            }
            match self.stream.piece() {
                Ok(Some(bytes)) => self.pending.extend(bytes),
                Ok(None) => self.over = true,
                Err(error) => {
                    self.over = true;
                    self.pending.clear();
                    return Some(Err(error));
                }
            }
        }
    }
}

/// A stream that was read to its end.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub text: String,
    pub chunks: Vec<Value>,
    pub error: Option<String>,
    pub done: bool,
    /// Whether the connection broke.
    pub broken: bool,
}

impl Events {
    /// Reads a stream of text or chat completions to its end.
    pub(crate) fn transcript(self) -> Transcript {
        let mut all = Transcript::default();
        for event in self {
            let Ok(event) = event else {
                all.broken = true;
                break;
            };
            assert!(!all.done, "nothing follows [DONE]: {event}");
            if event == "[DONE]" {
                all.done = true;
                continue;
            }
            let chunk: Value = serde_json::from_str(&event).expect("an event is JSON");
            if chunk.get("error").is_some() {
                all.error = Some(error_message(&chunk));
                continue;
            }
            let choice = &chunk["choices"][0];
            let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            all.text.push_str(text.unwrap_or_default());
            all.chunks.push(chunk);
        }
        all
    }
}
