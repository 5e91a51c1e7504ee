//! `ingot verify` on a tiny model.

use ingot::gguf::TensorType;
use ingot::gguf::fixture::{TinyLlama, tiny_llama};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn verify(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ingot"));
    command.arg("verify").arg(folder.join("tiny.gguf")).args(arguments);
    command.arg("--data-dir").arg(folder.join("data")).output().unwrap()
}

#[test]
fn verify_prints_a_table_and_writes_json() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = TinyLlama { ty: TensorType::BF16, ..TinyLlama::default() };
    tiny_llama(&folder.path().join("tiny.gguf"), &tiny).unwrap();
    let json = folder.path().join("report.json");
    let output = verify(folder.path(), &["--tokens", "600", "--json", json.to_str().unwrap()]);
    let (table, log) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{table}{log}");
    assert!(table.starts_with("llama 0M BF16, 600 tokens in windows of 512"), "{table}");
    for line in ["reference ", "native ", "llama.cpp ", "F32, native ", "ok "] {
        assert!(table.lines().any(|l| l.starts_with(line)), "`{line}` is not in\n{table}");
    }
    let report: Value = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    assert_eq!(report["runners"][0]["runner"], "native");
    assert!(report["checks"].as_array().unwrap().iter().all(|check| check["passed"] == true));
}

#[test]
fn verify_says_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let output = verify(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(1));
    fs::write(folder.path().join("tiny.gguf"), "GGUF but not really, no model at all").unwrap();
    let output = verify(folder.path(), &[]);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && log.contains("version"), "{log}");
}
