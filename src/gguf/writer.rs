//! [`GgufWriter`]: writes a GGUF file (version 3) atomically.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use half::{bf16, f16};

use super::error::malformed;
use super::reader::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_NAME};
use super::types::{Array, Value};
use crate::gguf::{Gguf, GgufError, TensorType};

/// Number of values converted at a time, so that no converted copy of a whole tensor is held.
const CHUNK: usize = 1 << 14;

/// Writes the bytes of one tensor.
type Produce<'a> = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + 'a>;

struct Pending<'a> {
    name: String,
    dims: Vec<u64>,
    ty: TensorType,
    bytes: u64,
    produce: Produce<'a>,
}

/// Collects metadata and tensors, then streams them to a file, one tensor at a time.
///
/// Tensors may borrow their data for `'a`.
#[derive(Default)]
pub struct GgufWriter<'a> {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Pending<'a>>,
    names: HashSet<String>,
}

impl<'a> GgufWriter<'a> {
    /// An empty writer.
    pub fn new() -> GgufWriter<'a> {
        GgufWriter::default()
    }

    /// Sets a key, replacing an earlier value. `general.alignment` is ignored, because the writer
    /// always aligns data to 32 bytes.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        if key == "general.alignment" {
            return self;
        }
        let value = value.into();
        match self.metadata.iter_mut().find(|(k, _)| k == key) {
            Some(slot) => slot.1 = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    /// Copies the keys of another file that `keep` accepts, in their order.
    pub fn copy_metadata(&mut self, from: &Gguf, keep: impl Fn(&str) -> bool) -> &mut Self {
        for (key, value) in from.metadata().filter(|(key, _)| keep(key)) {
            self.set(key, value.clone());
        }
        self
    }

    /// Adds a tensor with its bytes. `dims` is in ggml's order (first dimension contiguous).
    ///
    /// # Errors
    /// [`GgufError::Malformed`] for a name or shape that no reader would accept, a duplicate name,
    /// or the wrong number of bytes.
    pub fn tensor(
        &mut self,
        name: &str,
        dims: &[u64],
        ty: TensorType,
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<&mut Self, GgufError> {
        let data = data.into();
        let bytes = check_shape(name, dims, ty)?;
        if bytes != data.len() as u64 {
            malformed!("tensor '{name}' needs {bytes} bytes but was given {}", data.len());
        }
        self.tensor_with(name, dims, ty, move |out| out.write_all(&data))
    }

    /// Adds a tensor from `f32` values, converted to `ty` (F32, F16 or BF16) while writing.
    ///
    /// # Errors
    /// As [`GgufWriter::tensor`], and for any other type.
    pub fn tensor_f32(
        &mut self,
        name: &str,
        dims: &[u64],
        ty: TensorType,
        data: impl Into<Cow<'a, [f32]>>,
    ) -> Result<&mut Self, GgufError> {
        let data = data.into();
        if !matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16) {
            malformed!("tensor '{name}' cannot be converted from f32 to {ty}");
        }
        let bytes = check_shape(name, dims, ty)?;
        if bytes != data.len() as u64 * ty.block_bytes() {
            let needed = bytes / ty.block_bytes();
            malformed!("tensor '{name}' needs {needed} elements but was given {}", data.len());
        }
        self.tensor_with(name, dims, ty, move |out| write_f32(out, ty, data.iter().copied()))
    }

    /// Adds a tensor whose bytes `produce` writes only when the file is written, so that they need
    /// not be held before. Writing fails if the number of bytes does not match shape and type.
    ///
    /// # Errors
    /// As [`GgufWriter::tensor`].
    pub fn tensor_with(
        &mut self,
        name: &str,
        dims: &[u64],
        ty: TensorType,
        produce: impl FnOnce(&mut dyn Write) -> io::Result<()> + 'a,
    ) -> Result<&mut Self, GgufError> {
        let bytes = check_shape(name, dims, ty)?;
        if !self.names.insert(name.to_owned()) {
            malformed!("tensor '{name}' was added twice");
        }
        let (name, dims) = (name.to_owned(), dims.to_vec());
        self.tensors.push(Pending { name, dims, ty, bytes, produce: Box::new(produce) });
        Ok(self)
    }

    /// Writes the file to a temporary name in the same folder, syncs it, then renames it, so that
    /// `path` never holds a partial file. Returns the size in bytes.
    ///
    /// # Errors
    /// [`GgufError::Io`], or [`GgufError::Malformed`] for a key that no reader would accept. `path`
    /// is then unchanged.
    pub fn write(self, path: &Path) -> Result<u64, GgufError> {
        if let Some((key, _)) = self.metadata.iter().find(|(k, _)| k.is_empty() || k.len() > 65_535)
        {
            malformed!("a key of {} bytes cannot be written", key.len());
        }
        let action = "write the GGUF file";
        let (file, temporary) = Temporary::create(path).map_err(GgufError::io(action))?;
        let mut out = Counted { inner: BufWriter::with_capacity(1 << 20, file), at: 0 };
        self.write_to(&mut out)?;
        let size = out.at;
        let file = out.inner.into_inner().map_err(|e| e.into_error());
        file.and_then(|file| file.sync_all())
            .and_then(|()| temporary.rename(path))
            .map_err(GgufError::io(action))?;
        Ok(size)
    }

    fn write_to(self, out: &mut Counted<impl Write>) -> Result<(), GgufError> {
        let io = GgufError::io;
        out.write_all(&self.header()).map_err(io("write the GGUF file"))?;
        pad(out).map_err(io("write the GGUF file"))?;
        for tensor in self.tensors {
            let start = out.at;
            (tensor.produce)(out).map_err(io("write the GGUF file"))?;
            if out.at - start != tensor.bytes {
                let (name, bytes) = (tensor.name, out.at - start);
                malformed!("tensor '{name}' needs {} bytes but produced {bytes}", tensor.bytes);
            }
            pad(out).map_err(io("write the GGUF file"))?;
        }
        Ok(())
    }

    /// Magic, counts, metadata and tensor directory.
    fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            out.extend(value.type_id().to_le_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut out, &tensor.name);
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            out.extend(tensor.dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend((tensor.ty as u32).to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + tensor.bytes).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        out
    }
}

/// Size of a tensor in bytes, if the reader accepts its name and shape.
fn check_shape(name: &str, dims: &[u64], ty: TensorType) -> Result<u64, GgufError> {
    if name.len() > MAX_NAME || name.contains('\0') {
        malformed!("tensor name '{name}' is longer than {MAX_NAME} bytes or contains a zero byte");
    }
    let elements = dims.iter().try_fold(1u64, |n, &dim| n.checked_mul(dim));
    let elements = elements.filter(|&n| n > 0 && n <= i64::MAX as u64);
    let (Some(elements), 1..=MAX_DIMS) = (elements, dims.len()) else {
        malformed!("tensor '{name}' has the impossible shape {dims:?}");
    };
    let whole_rows = dims[0].is_multiple_of(ty.block_size());
    // The limit is far below `u64::MAX`, so that sums of offsets cannot overflow.
    match ty.bytes_for(elements).filter(|&bytes| whole_rows && bytes < 1 << 56) {
        Some(bytes) => Ok(bytes),
        None => malformed!("tensor '{name}' of shape {dims:?} is not whole blocks of {ty}"),
    }
}

/// Writes numbers as F32, F16 or BF16, little-endian.
pub(crate) fn write_f32(
    out: &mut dyn Write,
    ty: TensorType,
    values: impl Iterator<Item = f32>,
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(CHUNK * 4);
    for value in values {
        match ty {
            TensorType::F16 => buffer.extend(f16::from_f32(value).to_le_bytes()),
            TensorType::BF16 => buffer.extend(bf16::from_f32(value).to_le_bytes()),
            _ => buffer.extend(value.to_le_bytes()),
        }
        if buffer.len() >= CHUNK * 4 {
            out.write_all(&buffer)?;
            buffer.clear();
        }
    }
    out.write_all(&buffer)
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(v) => put_string(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|text| put_string(out, text)),
        Array::U64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
    }
}

fn pad(out: &mut Counted<impl Write>) -> io::Result<()> {
    let missing = out.at.next_multiple_of(DEFAULT_ALIGNMENT) - out.at;
    out.write_all(&[0; DEFAULT_ALIGNMENT as usize][..missing as usize])
}

/// A writer that counts its bytes.
struct Counted<W> {
    inner: W,
    at: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A file that is removed unless it is renamed to its final name.
struct Temporary(PathBuf);

impl Temporary {
    fn create(target: &Path) -> io::Result<(File, Temporary)> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = target.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        // Unique among threads by the count and among processes by the id. If a killed process with
        // the same id left a file, `create_new` fails rather than writing into it.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        hidden.push(format!(".{}-{count}.tmp", std::process::id()));
        let path = target.with_file_name(hidden);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok((file, Temporary(path)))
    }

    /// Renames the file to its final name and syncs the folder.
    fn rename(mut self, target: &Path) -> io::Result<()> {
        fs::rename(&self.0, target)?;
        self.0 = PathBuf::new();
        let folder = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(folder)?.sync_all()
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            // A failure here cannot be handled, and the write has already reported its own error.
            let _ = fs::remove_file(&self.0);
        }
    }
}
