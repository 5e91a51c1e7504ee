//! The parser used by [`Gguf`](crate::gguf::Gguf): numbers, strings and values, each bounded before
//! it is read.

use std::io::Read;

use super::error::malformed;
use super::types::{ARRAY_TYPE, Array, Value};
use crate::gguf::GgufError;

/// Maximum size of everything before the tensor data, in bytes. The largest real headers (a 260k
/// vocabulary with merges and the Hugging Face tokenizer embedded) are below 40 MiB.
const MAX_HEADER: u64 = 256 << 20;

/// Splits `data` into arrays of `N` bytes; a shorter rest is ignored.
pub(super) fn chunks<const N: usize>(data: &[u8]) -> impl Iterator<Item = [u8; N]> {
    data.as_chunks::<N>().0.iter().copied()
}

/// Reads little-endian values; memory is allocated only for bytes that are known to exist.
pub(super) struct Parser<R> {
    input: R,
    /// Bytes read so far.
    pub at: u64,
    end: u64,
    /// Whether a string had to be decoded with replacement characters.
    pub lossy: bool,
}

impl<R: Read> Parser<R> {
    /// `input` is the start of a file of `file_size` bytes.
    pub(super) fn new(input: R, file_size: u64) -> Parser<R> {
        Parser { input, at: 0, end: file_size.min(MAX_HEADER), lossy: false }
    }

    /// Number of bytes that may still be read.
    pub(super) fn left(&self) -> u64 {
        self.end - self.at
    }

    fn fill(&mut self, out: &mut [u8], what: &str) -> Result<(), GgufError> {
        if out.len() as u64 > self.left() {
            if self.end == MAX_HEADER {
                malformed!("the header passes 256 MiB at {what}");
            }
            malformed!("the file ends within {what}");
        }
        self.input.read_exact(out).map_err(GgufError::io("read the GGUF file"))?;
        self.at += out.len() as u64;
        Ok(())
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        self.fill(&mut out, what)?;
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn bytes(&mut self, what: &str, max: u64) -> Result<Vec<u8>, GgufError> {
        let len = self.u64(what)?;
        if len > max {
            malformed!("{what} is a string of {len} bytes, more than {max}");
        }
        if len > self.left() {
            malformed!("{what} is a string of {len} bytes, but only {} follow", self.left());
        }
        let mut out = vec![0; len as usize];
        self.fill(&mut out, what)?;
        Ok(out)
    }

    /// Reads a key or tensor name. It must be UTF-8, because it could not be looked up otherwise.
    pub(super) fn name(&mut self, what: &str, max: u64) -> Result<String, GgufError> {
        match String::from_utf8(self.bytes(what, max)?) {
            Ok(name) => Ok(name),
            Err(_) => malformed!("{what} is not UTF-8"),
        }
    }

    /// Reads a string value. Some vocabularies contain invalid bytes but still work: they are
    /// replaced.
    fn string(&mut self, what: &str) -> Result<String, GgufError> {
        let bytes = self.bytes(what, MAX_HEADER)?;
        Ok(String::from_utf8(bytes).unwrap_or_else(|e| {
            self.lossy = true;
            String::from_utf8_lossy(e.as_bytes()).into_owned()
        }))
    }

    pub(super) fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let what = &format!("key '{key}'");
        Ok(match self.u32(what)? {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.array::<1>(what)?[0] != 0),
            8 => Value::String(self.string(what)?),
            ARRAY_TYPE => Value::Array(self.value_array(what)?),
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            other => malformed!("{what} has the unknown type {other}"),
        })
    }

    fn value_array(&mut self, what: &str) -> Result<Array, GgufError> {
        let ty = self.u32(what)?;
        let n = self.u64(what)?;
        Ok(match ty {
            0 => Array::U8(self.numbers(n, what, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(n, what, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, what, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, what, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, what, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, what, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, what, f32::from_le_bytes)?),
            7 => Array::Bool(self.numbers(n, what, |[b]: [u8; 1]| b != 0)?),
            8 => {
                self.check_count(n, 8, what)?;
                let mut out = Vec::with_capacity(n as usize);
                for _ in 0..n {
                    out.push(self.string(what)?);
                }
                Array::String(out)
            }
            10 => Array::U64(self.numbers(n, what, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, what, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(n, what, f64::from_le_bytes)?),
            ARRAY_TYPE => malformed!("{what} is an array of arrays, which is not supported"),
            other => malformed!("{what} is an array of the unknown type {other}"),
        })
    }

    fn check_count(&self, n: u64, bytes_each: u64, what: &str) -> Result<(), GgufError> {
        if n > self.left() / bytes_each {
            malformed!("{what} announces {n} elements, but only {} bytes follow", self.left());
        }
        Ok(())
    }

    fn numbers<T, const N: usize>(
        &mut self,
        n: u64,
        what: &str,
        decode: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        self.check_count(n, N as u64, what)?;
        let mut bytes = vec![0; n as usize * N];
        self.fill(&mut bytes, what)?;
        Ok(chunks(&bytes).map(decode).collect())
    }
}
