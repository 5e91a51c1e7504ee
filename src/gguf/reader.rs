//! [`Gguf`]: the checked header of a file, and its tensor data.
//!
//! Format: `docs/gguf.md` of ggml, versions 2 and 3, little-endian. Checks mirror (and where noted
//! exceed) `ggml/src/gguf.cpp`, so that llama.cpp does not fail on a file accepted here.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use memmap2::Mmap;

use super::dequantize::dequantize;
use super::error::malformed;
use super::parser::Parser;
use super::types::{TensorType, Value};
use crate::gguf::GgufError;

/// Maximum number of dimensions of a tensor (`GGML_MAX_DIMS`).
pub(super) const MAX_DIMS: usize = 4;
/// Maximum length of a tensor name in bytes (`GGML_MAX_NAME` without the terminating zero).
pub(super) const MAX_NAME: usize = 63;
/// Alignment if `general.alignment` is absent (`GGUF_DEFAULT_ALIGNMENT`).
pub(super) const DEFAULT_ALIGNMENT: u64 = 32;
/// First four bytes of every file.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";

/// The format's limit on the length of a key.
const MAX_KEY: u64 = 65_535;
/// Smallest encodings: a key (length, one byte, type, one byte) and a tensor (length, no
/// dimensions, type, offset). They bound the counts by the bytes that the file really has.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
/// Maximum alignment, which keeps arithmetic from overflowing.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Name, shape, type and position of one tensor. Every field was checked against the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    name: String,
    ne: [u64; MAX_DIMS],
    n_dims: usize,
    ty: TensorType,
    offset: u64,
    bytes: u64,
}

impl TensorInfo {
    /// The name, such as `blk.0.attn_q.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The shape in ggml's order: the first dimension is contiguous. A linear layer from `in` to
    /// `out` features is `[in, out]`.
    pub fn dims(&self) -> &[u64] {
        &self.ne[..self.n_dims]
    }

    /// All four dimensions, missing ones as 1.
    pub fn ne(&self) -> [u64; MAX_DIMS] {
        self.ne
    }

    /// The storage type of the elements.
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Number of elements; checked to fit `i64`.
    pub fn elements(&self) -> u64 {
        self.ne.iter().product()
    }

    /// Bytes of data, without padding.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Start of the data, in bytes from the start of the file.
    pub fn file_offset(&self) -> u64 {
        self.offset
    }
}

/// An open GGUF file: parsed metadata, tensor directory and, unless only the header was opened, the
/// mapped tensor data.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: Vec<(String, Value)>,
    keys: HashMap<String, usize>,
    tensors: Vec<TensorInfo>,
    names: HashMap<String, usize>,
    lossy: Vec<String>,
    alignment: u64,
    data_offset: u64,
    file_size: u64,
    map: Option<Mmap>,
}

impl Gguf {
    /// Opens and checks a file, and maps it for [`Gguf::data`].
    ///
    /// # Errors
    /// [`GgufError`] if the file cannot be read or anything in its header is inconsistent.
    #[allow(unsafe_code)]
    pub fn open(path: impl AsRef<Path>) -> Result<Gguf, GgufError> {
        let (file, size) = open_regular(path.as_ref())?;
        // SAFETY: the mapping is read-only and private to this value. It is sound as long as no
        // process shrinks or rewrites the file meanwhile; Ingot's own writers replace files by
        // rename, which does not change the mapped inode. Processes that must survive a hostile
        // owner of the file (the gateway) use `open_header`, which does not map.
        let map = unsafe { Mmap::map(&file) }.map_err(GgufError::io("map the GGUF file"))?;
        if map.len() as u64 != size {
            malformed!("the file changed its size while it was being opened");
        }
        let mut gguf = Gguf::parse(&map[..], size)?;
        gguf.map = Some(map);
        Ok(gguf)
    }

    /// Opens and checks the header with plain reads: nothing is mapped, no tensor data is read, and
    /// there is no SIGBUS if the file shrinks meanwhile. [`Gguf::data`] then returns an error.
    ///
    /// # Errors
    /// As [`Gguf::open`].
    pub fn open_header(path: impl AsRef<Path>) -> Result<Gguf, GgufError> {
        let (file, size) = open_regular(path.as_ref())?;
        Gguf::parse(BufReader::with_capacity(1 << 16, file), size)
    }

    /// Parses a header from `input`, the start of a file of `file_size` bytes.
    pub(crate) fn parse(input: impl Read, file_size: u64) -> Result<Gguf, GgufError> {
        let mut p = Parser::new(input, file_size);
        let magic: [u8; 4] = p.array("the magic")?;
        if magic != MAGIC {
            malformed!("this is not a GGUF file: it does not start with the bytes 'GGUF'");
        }
        let version = p.u32("the version")?;
        if !(2..=3).contains(&version) {
            if version & 0xffff == 0 {
                malformed!("the file is big-endian; only little-endian GGUF is supported");
            }
            malformed!("GGUF version {version} is not supported, only versions 2 and 3");
        }
        let n_tensors = p.u64("the tensor count")?;
        let n_keys = p.u64("the key count")?;
        if n_tensors > p.left() / MIN_TENSOR_BYTES || n_keys > p.left() / MIN_KEY_BYTES {
            malformed!("the header announces {n_keys} keys and {n_tensors} tensors, more than fit");
        }

        let mut gguf = Gguf {
            version,
            metadata: Vec::new(),
            keys: HashMap::new(),
            tensors: Vec::new(),
            names: HashMap::new(),
            lossy: Vec::new(),
            alignment: DEFAULT_ALIGNMENT,
            data_offset: 0,
            file_size,
            map: None,
        };
        for index in 0..n_keys {
            gguf.read_key(&mut p, index)?;
        }
        gguf.alignment = gguf.read_alignment()?;
        for index in 0..n_tensors {
            gguf.read_tensor(&mut p, index)?;
        }
        gguf.place_tensors(p.at)?;
        Ok(gguf)
    }

    fn read_key(&mut self, p: &mut Parser<impl Read>, index: u64) -> Result<(), GgufError> {
        let key = p.name(&format!("key {index}"), MAX_KEY)?;
        if key.is_empty() {
            malformed!("key {index} has an empty name");
        }
        p.lossy = false;
        let value = p.value(&key)?;
        if p.lossy {
            self.lossy.push(key.clone());
        }
        if self.keys.insert(key.clone(), self.metadata.len()).is_some() {
            malformed!("key '{key}' appears twice");
        }
        self.metadata.push((key, value));
        Ok(())
    }

    fn read_alignment(&self) -> Result<u64, GgufError> {
        let alignment = match self.get("general.alignment") {
            None => return Ok(DEFAULT_ALIGNMENT),
            Some(Value::U32(alignment)) => u64::from(*alignment),
            Some(other) => {
                malformed!("key 'general.alignment' holds {}, not u32", other.type_name())
            }
        };
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            malformed!("key 'general.alignment' is {alignment}, not a power of two up to 2^20");
        }
        Ok(alignment)
    }

    fn read_tensor(&mut self, p: &mut Parser<impl Read>, index: u64) -> Result<(), GgufError> {
        let name = p.name(&format!("the name of tensor {index}"), MAX_NAME as u64)?;
        if name.contains('\0') {
            malformed!("the name of tensor {index} contains a zero byte");
        }
        let what = format!("tensor '{name}'");
        let n_dims = p.u32(&what)? as usize;
        if n_dims > MAX_DIMS {
            malformed!("{what} has {n_dims} dimensions, more than {MAX_DIMS}");
        }
        let mut ne = [1; MAX_DIMS];
        let mut elements: u64 = 1;
        for dim in &mut ne[..n_dims] {
            *dim = p.u64(&what)?;
            elements = match elements.checked_mul(*dim) {
                Some(n) if n > 0 && n <= i64::MAX as u64 => n,
                _ => malformed!("{what} has an impossible dimension {dim}"),
            };
        }
        let ty = TensorType::try_from(p.u32(&what)?)
            .map_err(|e| GgufError::Malformed(format!("{what} has an unknown type: {e}")))?;
        if !ne[0].is_multiple_of(ty.block_size()) {
            malformed!(
                "{what} has rows of {} elements, not a multiple of the {} in a block of {ty}",
                ne[0],
                ty.block_size()
            );
        }
        let Some(bytes) = ty.bytes_for(elements) else {
            malformed!("{what} has more bytes than can be counted");
        };
        let offset = p.u64(&what)?;
        if self.names.insert(name.clone(), self.tensors.len()).is_some() {
            malformed!("{what} appears twice");
        }
        self.tensors.push(TensorInfo { name, ne, n_dims, ty, offset, bytes });
        Ok(())
    }

    /// Converts offsets to positions in the file. Like llama.cpp, requires that tensors follow each
    /// other in order, each padded to the alignment, which also rules out overlaps.
    fn place_tensors(&mut self, header_end: u64) -> Result<(), GgufError> {
        self.data_offset = header_end.next_multiple_of(self.alignment);
        let mut expected = 0u64;
        for tensor in &mut self.tensors {
            let name = &tensor.name;
            if tensor.offset != expected {
                malformed!("tensor '{name}' is at offset {}, expected {expected}", tensor.offset);
            }
            let start = self.data_offset.checked_add(expected);
            let end = start.and_then(|start| start.checked_add(tensor.bytes));
            let (Some(start), Some(end)) = (start, end) else {
                malformed!("tensor '{name}' ends past any possible file");
            };
            if end > self.file_size {
                let size = self.file_size;
                malformed!("tensor '{name}' ends at byte {end}, but the file has only {size}");
            }
            tensor.offset = start;
            // `end` is within the file, so neither sum can overflow.
            expected = (expected + tensor.bytes).next_multiple_of(self.alignment);
        }
        Ok(())
    }

    /// Format version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Size of the file in bytes.
    pub fn file_size(&self) -> u64 {
        self.file_size
    }

    /// Start of the tensor data, in bytes from the start of the file.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// Alignment of tensor data in bytes.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// All metadata in the order of the file.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Keys whose strings were not UTF-8 and were read with replacement characters. Copying such a
    /// key into another file would change it.
    pub fn lossy_keys(&self) -> &[String] {
        &self.lossy
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&at| &self.metadata[at].1)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &'static str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(v) => Ok(Some(v)),
            None => {
                Err(GgufError::WrongType { key: key.to_owned(), wanted, found: value.type_name() })
            }
        }
    }

    /// An integer of any width, not negative, that fits `u32`; `None` if the key is absent.
    ///
    /// # Errors
    /// [`GgufError::WrongType`], as for all typed getters.
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.typed(key, "a u32", |v| v.as_u64()?.try_into().ok())
    }

    /// A non-negative integer of any width.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a u64", Value::as_u64)
    }

    /// A float, as `f32`.
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.typed(key, "a float", |v| v.as_f64().map(|v| v as f32))
    }

    /// A boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a bool", Value::as_bool)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", Value::as_str)
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.typed(key, "an array of strings", |v| v.as_array()?.as_strings())
    }

    /// An array of non-negative integers of any width.
    pub fn u64s(&self, key: &str) -> Result<Option<Vec<u64>>, GgufError> {
        self.typed(key, "an array of integers", |v| v.as_array()?.to_u64s())
    }

    /// The tensor directory in the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|&at| &self.tensors[at])
    }

    /// The bytes of the tensor called `name`.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`], or [`GgufError::Malformed`] if only the header was opened.
    pub fn data(&self, name: &str) -> Result<&[u8], GgufError> {
        let info = self.tensor(name).ok_or_else(|| GgufError::MissingTensor(name.to_owned()))?;
        let Some(map) = &self.map else {
            malformed!("tensor '{name}' has no data here: only the header was opened");
        };
        // Position and size were checked against the length of this mapping.
        Ok(&map[info.offset as usize..][..info.bytes as usize])
    }

    /// A tensor as `f32`, in the order of [`TensorInfo::dims`].
    ///
    /// # Errors
    /// As [`Gguf::data`], and [`GgufError::Malformed`] for a type that
    /// [`can_dequantize`](crate::gguf::can_dequantize) does not support.
    pub fn to_f32(&self, name: &str) -> Result<Vec<f32>, GgufError> {
        let data = self.data(name)?;
        let info = self.tensor(name).expect("its data was found");
        let mut out = vec![0.0; info.elements() as usize];
        match dequantize(info.ty, data, &mut out) {
            Ok(()) => Ok(out),
            Err(error) => malformed!("tensor '{name}': {error}"),
        }
    }
}

/// Opens a regular file: opening a FIFO would block forever, and a directory gives an unclear
/// error.
fn open_regular(path: &Path) -> Result<(File, u64), GgufError> {
    let about = fs::metadata(path).map_err(GgufError::io("open the GGUF file"))?;
    if !about.is_file() {
        malformed!("this is not a regular file");
    }
    let file = File::open(path).map_err(GgufError::io("open the GGUF file"))?;
    let size = file.metadata().map_err(GgufError::io("open the GGUF file"))?.len();
    if size < 24 {
        malformed!("the file has {size} bytes, too few for a GGUF header");
    }
    Ok((file, size))
}
