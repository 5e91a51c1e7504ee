//! Tests of the server over real sockets, without models.

use super::accept::Connections;
use crate::config::ServeOptions;
use crate::gateway::app::App;
use crate::gateway::registry::Registry;
use crate::gateway::store::Store;
use serde_json::Value;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

struct Server {
    app: Arc<App>,
    address: SocketAddr,
    connections: Connections,
    _folder: tempfile::TempDir,
}

async fn server(toml: &str) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let mut options: ServeOptions = toml::from_str(toml).unwrap();
    options.data_dir = Some(folder.path().to_owned());
    let config = Arc::new(options.resolve().unwrap());
    let store = Arc::new(Store::open(folder.path()).unwrap());
    let (jobs, _) = tokio::sync::mpsc::unbounded_channel();
    let app = App::new(config.clone(), Registry::new(config, store), jobs);
    app.life.started();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Connections::start(listener, app.clone());
    Server { app, address, connections, _folder: folder }
}

/// Status, headers and body of the response to raw bytes; `None` if the connection was closed.
async fn raw(address: SocketAddr, request: &[u8]) -> Option<(u16, String, Vec<u8>)> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    // An error is a connection reset, which may follow a response.
    let _ =
        tokio::time::timeout(Duration::from_secs(5), read).await.expect("an answer, or the end");
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8(answer[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, head.to_lowercase(), answer[end + 4..].to_vec()))
}

async fn send(server: &Server, line: &str, headers: &str, body: &str) -> (u16, String, Value) {
    let request = format!(
        "{line} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let (status, head, body) = raw(server.address, request.as_bytes()).await.expect("an answer");
    (status, head, serde_json::from_slice(&body).unwrap_or(Value::Null))
}

#[tokio::test]
async fn every_error_has_openais_shape() {
    let server = server("body_limit = 1024").await;
    let json = "content-type: application/json\r\n";
    let long = "x".repeat(9_000);
    let big = "y".repeat(2_000);
    for (line, headers, body, status) in [
        ("GET /nothing", "", "", 404),
        ("GET /", "", "", 404),
        ("GET /v1/responses", "", "", 404),
        ("POST /v1/messages", json, "{}", 404),
        ("GET /v1/chat/completions", "", "", 405),
        ("DELETE /v1/models", "", "", 405),
        ("OPTIONS *", "", "", 405),
        ("GET /v1/models/org/model:1", "", "", 404),
        ("GET /v1/models/%ff", "", "", 400),
        ("GET /admin/models", "", "", 404),
        ("POST /v1/completions", "", "{}", 415),
        ("POST /v1/completions", "content-type: text/plain\r\n", "{}", 415),
        ("POST /v1/completions", json, "{", 400),
        ("POST /v1/completions", json, &big, 413),
        (&format!("GET /{long}"), "", "", 414),
        ("GET http://evil.example/v1/models", "", "", 403),
    ] {
        let (got, head, body) = send(&server, line, headers, body).await;
        let line: String = line.chars().take(60).collect();
        assert_eq!(got, status, "{line} {headers}");
        assert!(body["error"]["message"].is_string(), "{line}: {body}");
        assert!(body["error"].get("code").is_some(), "{line}: {body}");
        assert!(head.contains("x-request-id: req-"), "{line}: {head}");
        assert!(!head.contains("access-control"), "{line}: {head}");
    }
}

#[tokio::test]
async fn what_is_not_http_gets_an_error_or_the_end() {
    let server = server("").await;
    for request in [
        &b"\x16\x03\x01\x02\x00\x01"[..],
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n\0\0\0\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\nconnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        if let Some((status, _, body)) = raw(server.address, request).await {
            let shown = String::from_utf8_lossy(request);
            assert!((400..600).contains(&status), "{shown}: {status}");
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            assert!(body["error"]["message"].is_string(), "{shown}: {status} {body}");
        }
    }
    let giant = format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "y".repeat(200_000));
    if let Some((status, ..)) = raw(server.address, giant.as_bytes()).await {
        assert_eq!(status, 431);
    }
    assert_eq!(send(&server, "GET /health", "", "").await.0, 200);
}

#[tokio::test]
async fn slow_senders_are_cut_off() {
    let server = server("header_timeout = \"200ms\"\nbody_timeout = \"200ms\"").await;
    // Half a header: the connection is closed.
    assert!(raw(server.address, b"GET /health HTTP/1.1\r\nho").await.is_none());
    // Half a body: a 408.
    let half =
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                 content-length: 100\r\n\r\n{\"a\":";
    let (status, _, body) = raw(server.address, half).await.unwrap();
    assert_eq!(status, 408, "{}", String::from_utf8_lossy(&body));
}

/// Reads one response with a `content-length` and leaves the connection open.
async fn answer_on(stream: &mut TcpStream) -> std::io::Result<(u16, String)> {
    let mut bytes = Vec::new();
    loop {
        let head = String::from_utf8_lossy(&bytes).to_lowercase();
        if let Some((head, body)) = head.split_once("\r\n\r\n") {
            let length = head.split_once("content-length: ").expect("a length").1;
            let length: usize = length.lines().next().unwrap().parse().unwrap();
            if body.len() >= length {
                return Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_owned()));
            }
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[tokio::test]
async fn a_connection_survives_a_refusal_whose_body_comes_late() {
    let server = server("api_key = [\"k\"]").await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    // A request without key, an unknown route, and an unimplemented route: none reads the body.
    for (path, headers, expected) in [
        ("/v1/completions", "", 401),
        ("/nothing", "authorization: Bearer k\r\n", 404),
        ("/v1/responses", "authorization: Bearer k\r\n", 404),
        ("/v1/models", "authorization: Bearer k\r\n", 405),
    ] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: 100000\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            stream.write_all(&[b'x'; 10_000]).await.unwrap();
        }
        let (status, head) = answer_on(&mut stream).await.expect("an answer");
        assert_eq!(status, expected, "{path}: {head}");
        assert!(!head.contains("connection: close"), "{path}: {head}");
    }
}

#[tokio::test]
async fn a_connection_that_cannot_be_used_again_is_said_to_close() {
    let server = server("").await;
    for (headers, body) in [("", "{"), ("expect: 100-continue\r\n", "")] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = format!(
            "POST /nothing HTTP/1.1\r\nhost: localhost\r\n{headers}content-length: 100\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let (status, head) = answer_on(&mut stream).await.expect("an answer");
        assert_eq!(status, 404, "{head}");
        assert!(head.contains("connection: close"), "{head}");
        assert!(answer_on(&mut stream).await.is_err(), "the connection stayed open");
    }
}

#[tokio::test]
async fn keys_guard_what_they_should() {
    let server = server("api_key = [\"k\"]\nadmin_key = \"root\"\nrate_limit = 2").await;
    let key = "authorization: Bearer k\r\n";
    let admin = "authorization: Bearer root\r\n";
    for (line, headers, status) in [
        ("GET /v1/models", "", 401),
        ("GET /v1/models", "authorization: Bearer x\r\n", 401),
        ("GET /v1/models", key, 200),
        ("GET /v1/models", key, 200),
        ("GET /v1/models", key, 429),
        ("GET /v1/models", admin, 200),
        ("POST /tokenize", "", 401),
        ("GET /admin/models", "", 401),
        ("GET /admin/models", key, 401),
        ("GET /admin/models", admin, 200),
        ("GET /admin/adapters", admin, 200),
        ("DELETE /admin/models/x", admin, 404),
        ("DELETE /admin/models/x", "", 401),
        ("PUT /admin/models", admin, 405),
        ("GET /health", "", 200),
        ("GET /ready", "", 200),
        ("GET /version", "", 200),
        ("GET /metrics", "", 200),
        ("GET /openapi.json", "", 200),
    ] {
        let (got, head, body) = send(&server, line, headers, "").await;
        assert_eq!(got, status, "{line} {headers}: {body}");
        assert_eq!(head.contains("retry-after"), status == 429, "{line}: {head}");
    }
    let text = server.app.metrics.render(&[], &Default::default());
    assert!(text.contains(r#"ingot_requests_rejected_total{reason="unauthorized"} 6"#), "{text}");
    assert!(text.contains(r#"ingot_requests_rejected_total{reason="rate_limit_exceeded"} 1"#));
}

#[tokio::test]
async fn admin_bodies_are_read_strictly() {
    let server = server("admin_key = \"root\"").await;
    let json = "authorization: Bearer root\r\ncontent-type: application/json\r\n";
    let form = "authorization: Bearer root\r\ncontent-type: multipart/form-data; boundary=b\r\n";
    for (line, headers, body, status) in [
        ("POST /admin/models", json, "{}", 400),
        ("POST /admin/models", json, "{\"model\": \"x\", \"path\": \"/etc\"}", 400),
        ("POST /admin/models", json, "{\"model\": \"/etc/passwd\"}", 404),
        ("POST /admin/adapters", json, "{\"name\": \"a\", \"source\": \"../x\"}", 400),
        ("POST /admin/adapters", json, "{\"name\": \"a\"}", 404),
        ("POST /admin/adapters", "authorization: Bearer root\r\n", "{}", 415),
        ("POST /admin/adapters", form, "no boundary at all", 400),
        ("POST /admin/adapters", form, "--b--\r\n", 400),
        (
            "POST /admin/adapters",
            form,
            "--b\r\ncontent-disposition: form-data; name=\"name\"\r\n\r\na\r\n--b\r\n\
             content-disposition: form-data; name=\"f\"; filename=\"../../x.gguf\"\r\n\r\nGGUF\r\n\
             --b--\r\n",
            400,
        ),
    ] {
        let (got, _, answer) = send(&server, line, headers, body).await;
        assert_eq!(got, status, "{line} {body}: {answer}");
        assert!(answer["error"]["message"].is_string(), "{line} {body}: {answer}");
    }
}

#[tokio::test]
async fn a_drain_refuses_new_requests_and_closes() {
    let server = server("").await;
    server.app.life.drain();
    let (status, head, body) = send(&server, "GET /v1/models", "", "").await;
    assert_eq!(status, 503, "{body}");
    assert!(head.contains("connection: close"), "{head}");
    assert_eq!(send(&server, "GET /ready", "", "").await.0, 503);
    assert_eq!(send(&server, "GET /health", "", "").await.0, 200);
    let address = server.address;
    server.connections.stop(Duration::from_secs(1)).await;
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn connections_are_bounded() {
    let server = server("max_connections = 1").await;
    let first = TcpStream::connect(server.address).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let (status, _, body) = raw(server.address, b"").await.expect("an answer");
    assert_eq!(status, 503, "{}", String::from_utf8_lossy(&body));
    drop(first);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(send(&server, "GET /health", "", "").await.0, 200);
}

#[tokio::test]
async fn the_openapi_document_lists_every_route() {
    let server = server("admin_key = \"root\"").await;
    let (_, _, document) = send(&server, "GET /openapi.json", "", "").await;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys().filter(|key| *key != "parameters") {
            let line = format!("{} {}", method.to_uppercase(), path.replace(['{', '}'], ""));
            let (status, _, body) = send(&server, &line, "", "").await;
            let message = body["error"]["message"].as_str().unwrap_or_default();
            assert_ne!(status, 405, "{line}");
            assert!(!message.starts_with("There is no route"), "{line}: {message}");
        }
    }
}
