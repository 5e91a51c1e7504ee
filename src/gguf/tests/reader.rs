//! Written files are read back unchanged, and no bytes make the reader panic.

use std::fs;

use half::f16;
use proptest::prelude::*;

use super::folder;
use crate::gguf::{Array, Gguf, GgufError, GgufWriter, TensorType, Value};

/// A raw header: `keys` and `tensors` are raw bytes.
fn header(n_tensors: u64, n_keys: u64, rest: &[u8]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(n_tensors.to_le_bytes());
    out.extend(n_keys.to_le_bytes());
    out.extend(rest);
    out
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn parse(bytes: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::parse(bytes, bytes.len() as u64)
}

fn error(bytes: &[u8]) -> String {
    parse(bytes).expect_err("the file is malformed").to_string()
}

#[test]
fn every_kind_of_value_survives() {
    let values: Vec<Value> = vec![
        u8::MAX.into(),
        i8::MIN.into(),
        u16::MAX.into(),
        i16::MIN.into(),
        u32::MAX.into(),
        i32::MIN.into(),
        1.5f32.into(),
        true.into(),
        "text ▁".into(),
        u64::MAX.into(),
        i64::MIN.into(),
        (-2.5f64).into(),
        vec![1u8, 2].into(),
        vec![-1i8].into(),
        vec![3u16].into(),
        vec![-3i16].into(),
        vec![4u32].into(),
        vec![-4i32].into(),
        vec![0.5f32].into(),
        vec![true, false].into(),
        vec![String::new(), "b".to_owned()].into(),
        vec![5u64].into(),
        vec![-5i64].into(),
        vec![0.25f64].into(),
        Value::Array(Array::F32(Vec::new())),
    ];
    let dir = folder();
    let path = dir.path().join("values.gguf");
    let data: Vec<f32> = (0..6).map(|x| x as f32).collect();
    let mut writer = GgufWriter::new();
    for (i, value) in values.iter().enumerate() {
        writer.set(&format!("key.{i}"), value.clone());
    }
    writer.tensor_f32("one", &[3, 2], TensorType::F32, &data).unwrap();
    writer.tensor_f32("two", &[3, 2], TensorType::F16, &data).unwrap();
    writer.tensor_f32("three", &[6], TensorType::BF16, &data).unwrap();
    writer.tensor("four", &[32, 1, 2], TensorType::Q8_0, vec![7; 68]).unwrap();
    writer.tensor("refused", &[4], TensorType::I8, vec![7; 4]).unwrap();
    let size = writer.write(&path).unwrap();
    assert_eq!(size, fs::metadata(&path).unwrap().len());

    let gguf = Gguf::open(&path).unwrap();
    let read: Vec<_> = gguf.metadata().map(|(_, value)| value.clone()).collect();
    assert_eq!(read, values);
    for name in ["one", "two", "three"] {
        assert_eq!(gguf.to_f32(name).unwrap(), data);
        assert_eq!(gguf.tensor(name).unwrap().file_offset() % 32, 0);
    }
    assert_eq!(gguf.data("four").unwrap(), [7; 68]);
    assert_eq!(gguf.tensor("four").unwrap().dims(), [32, 1, 2]);
    assert!(matches!(gguf.data("five"), Err(GgufError::MissingTensor(_))));
    assert_eq!(gguf.to_f32("four").unwrap(), [7.0 * f16::from_bits(0x0707).to_f32(); 64]);
    let refused = gguf.to_f32("refused").unwrap_err().to_string();
    assert_eq!(refused, "tensor 'refused': type I8 cannot be converted to f32");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn typed_getters_say_what_they_found() {
    let mut writer = GgufWriter::new();
    writer.set("a", 7u8).set("b", -1i32).set("c", vec![1u16, 2]).set("d", "x");
    let dir = folder();
    let path = dir.path().join("x.gguf");
    writer.write(&path).unwrap();
    let gguf = Gguf::open_header(&path).unwrap();
    assert_eq!(gguf.u32("a").unwrap(), Some(7));
    assert_eq!(gguf.u32("none").unwrap(), None);
    assert_eq!(gguf.u64s("c").unwrap(), Some(vec![1, 2]));
    assert_eq!(gguf.str("d").unwrap(), Some("x"));
    let wrong = gguf.u32("b").unwrap_err().to_string();
    assert_eq!(wrong, "key 'b' holds i32 where a u32 was expected");
    assert!(gguf.strings("c").is_err() && gguf.bool("d").is_err() && gguf.f32("a").is_err());
}

#[test]
fn a_failed_write_leaves_nothing() {
    let dir = folder();
    let path = dir.path().join("x.gguf");
    fs::write(&path, "before").unwrap();
    let mut writer = GgufWriter::new();
    let too_short = |out: &mut dyn std::io::Write| out.write_all(&[0; 3]);
    writer.tensor_with("t", &[1], TensorType::F32, too_short).unwrap();
    assert!(writer.write(&path).unwrap_err().to_string().contains("'t' needs 4 bytes"));
    assert_eq!(fs::read(&path).unwrap(), b"before");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let mut writer = GgufWriter::new();
    let mut add = |name: &str, dims: &[u64], ty, bytes: usize| {
        writer.tensor(name, dims, ty, vec![0; bytes]).map(|_| ())
    };
    assert!(add("ok", &[4], TensorType::F32, 16).is_ok());
    assert!(add("ok", &[4], TensorType::F32, 16).is_err(), "twice");
    assert!(add(&"n".repeat(64), &[4], TensorType::F32, 16).is_err(), "long name");
    assert!(add("a", &[], TensorType::F32, 4).is_err(), "no dimensions");
    assert!(add("a", &[1; 5], TensorType::F32, 4).is_err(), "five dimensions");
    assert!(add("a", &[4, 0], TensorType::F32, 0).is_err(), "empty");
    assert!(add("a", &[16, 2], TensorType::Q8_0, 34).is_err(), "half blocks");
    assert!(add("a", &[4], TensorType::F32, 15).is_err(), "too few bytes");
    assert!(add("a", &[u64::MAX, 2], TensorType::F32, 15).is_err(), "overflow");
}

#[test]
#[allow(clippy::too_many_lines)] // a table of cases
fn malformed_headers_are_named() {
    let dim = |n: u64| n.to_le_bytes();
    let tensor = |name: &str, dims: &[u64], ty: u32, offset: u64| {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|&n| dim(n)).collect();
        let n = (dims.len() as u32).to_le_bytes();
        [&string(name), &n[..], &dims_bytes, &ty.to_le_bytes(), &offset.to_le_bytes()].concat()
    };
    let key =
        |name: &str, ty: u32, value: &[u8]| [&string(name), &ty.to_le_bytes()[..], value].concat();
    let array = |ty: u32, n: u64| [&ty.to_le_bytes()[..], &n.to_le_bytes()].concat();
    let pad = |mut bytes: Vec<u8>| {
        bytes.resize(bytes.len() + 4096, 0);
        bytes
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"GGUX".to_vec(), "not a GGUF file"),
        (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
        (b"GGUF\0\0\0\x03".to_vec(), "big-endian"),
        (header(0, 0, &[])[..20].to_vec(), "ends within the key count"),
        (header(u64::MAX, 0, &[]), "announces"),
        (header(0, 1 << 40, &[0; 64]), "announces"),
        (header(0, 1, &pad(key("", 0, &[1]))), "empty name"),
        (header(0, 1, &pad(key("k", 13, &[1]))), "key 'k' has the unknown type 13"),
        (header(0, 1, &pad(key("k", 9, &array(9, 1)))), "array of arrays"),
        (header(0, 1, &pad(key("k", 9, &array(0, u64::MAX)))), "announces"),
        (header(0, 1, &pad(key("k", 9, &array(8, 1 << 50)))), "announces"),
        (header(0, 1, &pad(key("k", 8, &dim(1 << 60)))), "is a string of"),
        (header(0, 1, &pad([dim(3).to_vec(), vec![0xff; 3]].concat())), "not UTF-8"),
        (header(0, 2, &pad(key("k", 0, &[1]).repeat(2))), "'k' appears twice"),
        (header(0, 1, &pad(key("general.alignment", 4, &[3, 0, 0, 0]))), "power of two"),
        (header(0, 1, &pad(key("general.alignment", 0, &[32]))), "u8, not u32"),
        (header(1, 0, &pad(tensor("t", &[1; 5], 0, 0))), "5 dimensions"),
        (header(1, 0, &pad(tensor("t", &[4, 0], 0, 0))), "impossible dimension 0"),
        (header(1, 0, &pad(tensor("t", &[1 << 40, 1 << 40], 0, 0))), "impossible dimension"),
        (header(1, 0, &pad(tensor("t", &[1 << 62], 28, 0))), "more bytes than can be counted"),
        (header(1, 0, &pad(tensor("t", &[4], 4, 0))), "'t' has an unknown type: 4"),
        (header(1, 0, &pad(tensor("t", &[33], 8, 0))), "not a multiple of the 32"),
        (header(1, 0, &pad(tensor("t", &[4], 0, 32))), "at offset 32, expected 0"),
        (header(1, 0, &pad(tensor("t", &[4], 0, u64::MAX))), "expected 0"),
        (header(1, 0, &pad(tensor("t", &[1 << 20], 0, 0))), "but the file has only"),
        (header(1, 0, &pad(tensor(&"n".repeat(64), &[4], 0, 0))), "string of 64 bytes"),
        (header(1, 0, &pad(tensor("a\0b", &[4], 0, 0))), "zero byte"),
        (header(2, 0, &pad(tensor("t", &[8], 0, 0).repeat(2))), "'t' appears twice"),
    ];
    for (bytes, expected) in cases {
        let message = error(&bytes);
        assert!(message.contains(expected), "'{message}' does not say '{expected}'");
    }
}

#[test]
fn version_2_is_read_and_stray_bytes_are_noted() {
    let value =
        [&string("k"), &8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[0xff, b'a']].concat();
    let mut bytes = header(0, 1, &value);
    bytes[4] = 2;
    let gguf = parse(&bytes).unwrap();
    assert_eq!((gguf.version(), gguf.lossy_keys()), (2, &["k".to_owned()][..]));
    assert_eq!(gguf.str("k").unwrap(), Some("\u{fffd}a"));
}

#[test]
fn only_regular_files_are_opened() {
    let dir = folder();
    assert!(Gguf::open(dir.path()).is_err());
    assert!(Gguf::open(dir.path().join("none")).is_err());
    fs::write(dir.path().join("empty"), "").unwrap();
    assert!(Gguf::open(dir.path().join("empty")).is_err());
    assert!(Gguf::open_header(dir.path().join("empty")).is_err());
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _ = parse(&bytes);
        let _ = parse(&header(1, 1, &bytes));
    }

    #[test]
    fn any_metadata_survives(pairs in prop::collection::btree_map("[a-z.]{1,12}", any::<(i64, String)>(), 0..20)) {
        let dir = folder();
        let path = dir.path().join("x.gguf");
        let mut writer = GgufWriter::new();
        for (key, (number, text)) in &pairs {
            writer.set(key, *number).set(&format!("{key}/s"), text.as_str());
        }
        writer.write(&path).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        for (key, (number, text)) in &pairs {
            prop_assert_eq!(gguf.get(key), Some(&Value::I64(*number)));
            prop_assert_eq!(gguf.str(&format!("{key}/s")).unwrap(), Some(text.as_str()));
        }
    }
}
