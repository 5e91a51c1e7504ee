//! Tensor types and metadata values of the GGUF format.
//!
//! Source: `ggml/include/ggml.h` (`enum ggml_type`), `ggml/src/ggml-common.h` (block layouts) and
//! `docs/gguf.md` of ggml.

use std::fmt;

/// Storage type of a tensor's elements. The discriminants are ggml's own numbers.
#[allow(missing_docs, non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum TensorType {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q8_1 = 9,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    Q8_K = 15,
    IQ2_XXS = 16,
    IQ2_XS = 17,
    IQ3_XXS = 18,
    IQ1_S = 19,
    IQ4_NL = 20,
    IQ3_S = 21,
    IQ2_S = 22,
    IQ4_XS = 23,
    I8 = 24,
    I16 = 25,
    I32 = 26,
    I64 = 27,
    F64 = 28,
    IQ1_M = 29,
    BF16 = 30,
    TQ1_0 = 34,
    TQ2_0 = 35,
    MXFP4 = 39,
    NVFP4 = 40,
    Q1_0 = 41,
    Q2_0 = 42,
}

/// Every type with its name in ggml, elements per block, and bytes per block.
const TYPES: &[(TensorType, &str, u64, u64)] = &[
    (TensorType::F32, "F32", 1, 4),
    (TensorType::F16, "F16", 1, 2),
    (TensorType::Q4_0, "Q4_0", 32, 18),
    (TensorType::Q4_1, "Q4_1", 32, 20),
    (TensorType::Q5_0, "Q5_0", 32, 22),
    (TensorType::Q5_1, "Q5_1", 32, 24),
    (TensorType::Q8_0, "Q8_0", 32, 34),
    (TensorType::Q8_1, "Q8_1", 32, 36),
    (TensorType::Q2_K, "Q2_K", 256, 84),
    (TensorType::Q3_K, "Q3_K", 256, 110),
    (TensorType::Q4_K, "Q4_K", 256, 144),
    (TensorType::Q5_K, "Q5_K", 256, 176),
    (TensorType::Q6_K, "Q6_K", 256, 210),
    (TensorType::Q8_K, "Q8_K", 256, 292),
    (TensorType::IQ2_XXS, "IQ2_XXS", 256, 66),
    (TensorType::IQ2_XS, "IQ2_XS", 256, 74),
    (TensorType::IQ3_XXS, "IQ3_XXS", 256, 98),
    (TensorType::IQ1_S, "IQ1_S", 256, 50),
    (TensorType::IQ4_NL, "IQ4_NL", 32, 18),
    (TensorType::IQ3_S, "IQ3_S", 256, 110),
    (TensorType::IQ2_S, "IQ2_S", 256, 82),
    (TensorType::IQ4_XS, "IQ4_XS", 256, 136),
    (TensorType::I8, "I8", 1, 1),
    (TensorType::I16, "I16", 1, 2),
    (TensorType::I32, "I32", 1, 4),
    (TensorType::I64, "I64", 1, 8),
    (TensorType::F64, "F64", 1, 8),
    (TensorType::IQ1_M, "IQ1_M", 256, 56),
    (TensorType::BF16, "BF16", 1, 2),
    (TensorType::TQ1_0, "TQ1_0", 256, 54),
    (TensorType::TQ2_0, "TQ2_0", 256, 66),
    (TensorType::MXFP4, "MXFP4", 32, 17),
    (TensorType::NVFP4, "NVFP4", 64, 36),
    (TensorType::Q1_0, "Q1_0", 128, 18),
    (TensorType::Q2_0, "Q2_0", 64, 18),
];

/// A type number that ggml does not define, or no longer defines (4, 5, 31 to 33, 36 to 38).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a tensor type that this version knows")]
pub struct UnknownTensorType(pub u32);

impl TensorType {
    fn row(self) -> &'static (TensorType, &'static str, u64, u64) {
        // TYPES is sorted by discriminant, so a binary search finds the row despite the gaps.
        let at = TYPES.binary_search_by_key(&(self as u32), |row| row.0 as u32);
        &TYPES[at.expect("every tensor type has a row in TYPES")]
    }

    /// All types, in the order of their numbers.
    pub fn all() -> impl Iterator<Item = TensorType> {
        TYPES.iter().map(|row| row.0)
    }

    /// ggml's name, such as `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Number of elements per block (1 for plain numbers). A row must be a whole number of blocks.
    pub fn block_size(self) -> u64 {
        self.row().2
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> u64 {
        self.row().3
    }

    /// Bytes of `elements` consecutive elements; `None` if they are not whole blocks or overflow.
    pub fn bytes_for(self, elements: u64) -> Option<u64> {
        let (_, _, block, bytes) = *self.row();
        if !elements.is_multiple_of(block) {
            return None;
        }
        (elements / block).checked_mul(bytes)
    }

    /// Whether elements are packed into blocks with scales.
    pub fn is_quantized(self) -> bool {
        self.block_size() > 1
    }
}

impl TryFrom<u32> for TensorType {
    type Error = UnknownTensorType;

    fn try_from(id: u32) -> Result<Self, UnknownTensorType> {
        match TYPES.binary_search_by_key(&id, |row| row.0 as u32) {
            Ok(at) => Ok(TYPES[at].0),
            Err(_) => Err(UnknownTensorType(id)),
        }
    }
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One metadata value.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: all elements have one type. Arrays of arrays do not exist (llama.cpp refuses
/// them too).
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Type number of arrays in a file (`GGUF_TYPE_ARRAY`).
pub(crate) const ARRAY_TYPE: u32 = 9;

impl Value {
    /// Number of this type in a file (`enum gguf_type`).
    pub(crate) fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => ARRAY_TYPE,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// Name of the value's type for messages: `u32`, `string`, `array of f32`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::U8(_) => "u8",
            Value::I8(_) => "i8",
            Value::U16(_) => "u16",
            Value::I16(_) => "i16",
            Value::U32(_) => "u32",
            Value::I32(_) => "i32",
            Value::F32(_) => "f32",
            Value::Bool(_) => "bool",
            Value::String(_) => "string",
            Value::Array(array) => array.type_name(),
            Value::U64(_) => "u64",
            Value::I64(_) => "i64",
            Value::F64(_) => "f64",
        }
    }

    /// Any integer type as `u64`, if it is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(v) => Some(v.into()),
            Value::U16(v) => Some(v.into()),
            Value::U32(v) => Some(v.into()),
            Value::U64(v) => Some(v),
            Value::I8(v) => v.try_into().ok(),
            Value::I16(v) => v.try_into().ok(),
            Value::I32(v) => v.try_into().ok(),
            Value::I64(v) => v.try_into().ok(),
            _ => None,
        }
    }

    /// A floating-point value as `f64`.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(v) => Some(v.into()),
            Value::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(v) => Some(v),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(v) => Some(v),
            _ => None,
        }
    }
}

macro_rules! value_from {
    ($($from:ty => $variant:ident),* $(,)?) => {$(
        impl From<$from> for Value {
            fn from(v: $from) -> Value {
                Value::$variant(v.into())
            }
        }
        impl From<Vec<$from>> for Value {
            fn from(v: Vec<$from>) -> Value {
                Value::Array(Array::$variant(v))
            }
        }
    )*};
}

value_from!(
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f32 => F32, f64 => F64, bool => Bool, String => String,
);

impl From<&str> for Value {
    fn from(v: &str) -> Value {
        Value::String(v.to_owned())
    }
}

macro_rules! each_array {
    ($array:expr, $v:ident => $body:expr) => {
        match $array {
            Array::U8($v) => $body,
            Array::I8($v) => $body,
            Array::U16($v) => $body,
            Array::I16($v) => $body,
            Array::U32($v) => $body,
            Array::I32($v) => $body,
            Array::F32($v) => $body,
            Array::Bool($v) => $body,
            Array::String($v) => $body,
            Array::U64($v) => $body,
            Array::I64($v) => $body,
            Array::F64($v) => $body,
        }
    };
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        each_array!(self, v => v.len())
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of the element type in a file.
    pub(crate) fn element_type_id(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::String(_) => 8,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }

    /// Name of the array's type for messages.
    pub fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "array of u8",
            Array::I8(_) => "array of i8",
            Array::U16(_) => "array of u16",
            Array::I16(_) => "array of i16",
            Array::U32(_) => "array of u32",
            Array::I32(_) => "array of i32",
            Array::F32(_) => "array of f32",
            Array::Bool(_) => "array of bool",
            Array::String(_) => "array of string",
            Array::U64(_) => "array of u64",
            Array::I64(_) => "array of i64",
            Array::F64(_) => "array of f64",
        }
    }

    /// An array of any integer type as `u64`, if no element is negative. Bools count as 0 and 1.
    pub fn to_u64s(&self) -> Option<Vec<u64>> {
        match self {
            Array::U8(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U16(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U32(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::U64(v) => Some(v.clone()),
            Array::I8(v) => v.iter().map(|&x| x.try_into().ok()).collect(),
            Array::I16(v) => v.iter().map(|&x| x.try_into().ok()).collect(),
            Array::I32(v) => v.iter().map(|&x| x.try_into().ok()).collect(),
            Array::I64(v) => v.iter().map(|&x| x.try_into().ok()).collect(),
            Array::Bool(v) => Some(v.iter().map(|&x| x.into()).collect()),
            Array::F32(_) | Array::F64(_) | Array::String(_) => None,
        }
    }

    /// An array of strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            Array::String(v) => Some(v),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_sorted_and_round_trip() {
        for ty in TensorType::all() {
            assert_eq!(TensorType::try_from(ty as u32), Ok(ty));
            assert_eq!(ty.bytes_for(ty.block_size()), Some(ty.block_bytes()));
        }
        assert!(TYPES.is_sorted_by_key(|row| row.0 as u32));
        for id in [4, 5, 31, 32, 33, 36, 37, 38, 43, u32::MAX] {
            assert_eq!(TensorType::try_from(id), Err(UnknownTensorType(id)));
        }
    }

    #[test]
    fn bytes_need_whole_blocks_and_do_not_overflow() {
        assert_eq!(TensorType::Q4_1.bytes_for(64), Some(40));
        assert_eq!(TensorType::Q4_1.bytes_for(63), None);
        assert_eq!(TensorType::F64.bytes_for(u64::MAX), None);
        assert_eq!(TensorType::Q4_K.to_string(), "Q4_K");
    }
}
