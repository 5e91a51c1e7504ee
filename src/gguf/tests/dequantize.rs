//! Compares every decoder with ggml's own, bit for bit.

use llama_cpp_sys_2 as sys;

use super::folder;
use crate::gguf::fixture::Rng;
use crate::gguf::{
    DequantizeError, Gguf, GgufWriter, TensorType, can_dequantize, dequantize, dequantized_bytes,
    quantize_q8_0, write_dequantized,
};

/// ggml's decoding of `bytes`; `None` if it has no decoder.
fn ggml(ty: TensorType, bytes: &[u8], elements: usize) -> Option<Vec<f32>> {
    // ggml reads blocks as structs of u16 or u32, so they must be aligned.
    let words: Vec<u64> = bytes
        .chunks(8)
        .map(|part| {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            u64::from_ne_bytes(word)
        })
        .collect();
    let mut out = vec![f32::NAN; elements];
    // SAFETY: the traits of a type that ggml defines are a constant; `words` holds whole blocks of
    // `elements` elements, checked by the caller, and `out` has room for them.
    unsafe {
        let to_float = (*sys::ggml_get_type_traits(ty as sys::ggml_type)).to_float?;
        to_float(words.as_ptr().cast(), out.as_mut_ptr(), elements as i64);
    }
    Some(out)
}

fn ours(ty: TensorType, bytes: &[u8], elements: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; elements];
    dequantize(ty, bytes, &mut out).unwrap();
    out
}

fn assert_same_bits(ty: TensorType, bytes: &[u8]) {
    let elements = bytes.len() as u64 / ty.block_bytes() * ty.block_size();
    assert_eq!(ty.bytes_for(elements), Some(bytes.len() as u64), "{ty}: whole blocks");
    let ours = ours(ty, bytes, elements as usize);
    let theirs = ggml(ty, bytes, elements as usize).expect("ggml decodes what we decode");
    // A signalling NaN may become a quiet one.
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    for (at, (&a, &b)) in ours.iter().zip(&theirs).enumerate() {
        assert!(same(a, b), "{ty}: element {at} is {a:e}, but {b:e} in ggml");
    }
    let finite = ours.iter().filter(|x| x.is_finite()).count();
    assert!(finite > ours.len() / 2, "{ty}: most scales are finite, or this tests nothing");
}

#[test]
fn random_blocks_decode_as_in_ggml() {
    // Random bytes: codes and scales of all values and signs, including subnormal ones, and
    // sometimes a scale that is infinite or NaN.
    let mut rng = Rng(7);
    for ty in TensorType::all().filter(|&ty| can_dequantize(ty) && ty != TensorType::F32) {
        let bytes: Vec<u8> = (0..2000 * ty.block_bytes()).map(|_| rng.next() as u8).collect();
        assert_same_bits(ty, &bytes);
    }
}

#[test]
fn all_halves_decode_as_in_ggml() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    assert_same_bits(TensorType::F16, &all);
    assert_same_bits(TensorType::BF16, &all);
}

/// One block per scale of one byte, with all sixteen codes.
#[test]
fn all_small_scales_decode_as_in_ggml() {
    let codes = |n: usize| (0..n).map(|i| (i * 0x11) as u8);
    let mx: Vec<u8> = (0..=255u8).flat_map(|d| std::iter::once(d).chain(codes(16))).collect();
    assert_same_bits(TensorType::MXFP4, &mx);
    let nv: Vec<u8> = (0..=255u8).flat_map(|d| [d; 4].into_iter().chain(codes(32))).collect();
    assert_same_bits(TensorType::NVFP4, &nv);
}

#[test]
fn f32_is_copied() {
    let bits = [0, 1, 0x8000_0000, 0x3f80_0000, 0x7f80_0000, 0x7fc0_0001];
    let bytes: Vec<u8> = bits.iter().flat_map(|bits: &u32| bits.to_le_bytes()).collect();
    let out = ours(TensorType::F32, &bytes, bits.len());
    assert_eq!(out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits);
}

#[test]
fn other_types_are_refused_by_name() {
    let refused: Vec<&str> =
        TensorType::all().filter(|&ty| !can_dequantize(ty)).map(TensorType::name).collect();
    let expected = [
        "Q8_1", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ3_S", "IQ2_S", "I8", "I16",
        "I32", "I64", "F64", "IQ1_M",
    ];
    assert_eq!(refused, expected);
    let error = dequantize(TensorType::IQ2_XS, &[0; 74], &mut [0.0; 256]).unwrap_err();
    assert_eq!(error.to_string(), "type IQ2_XS cannot be converted to f32");
}

#[test]
fn lengths_have_to_agree() {
    for (bytes, elements) in [(18, 31), (18, 64), (17, 32), (36, 32), (0, 32), (18, 0)] {
        let mut out = vec![1.0; elements];
        let ty = TensorType::Q4_0;
        let error = dequantize(ty, &vec![0; bytes], &mut out).unwrap_err();
        assert_eq!(error, DequantizeError::Length { ty, bytes, elements });
        assert!(out.iter().all(|&x| x == 1.0), "untouched");
    }
    assert_eq!(dequantize(TensorType::Q4_0, &[], &mut []), Ok(()));
}

/// Checks all types in ggml's own list.
#[test]
fn nothing_of_ggml_is_forgotten() {
    let mut left = Vec::new();
    for id in 0..sys::GGML_TYPE_COUNT {
        // SAFETY: every number below the count has traits, constants of ggml's.
        let traits = unsafe { &*sys::ggml_get_type_traits(id) };
        let Ok(ty) = TensorType::try_from(id) else {
            assert_eq!(traits.blck_size, 0, "type {id} is in use");
            continue;
        };
        assert_eq!(ty.block_size(), traits.blck_size as u64, "{ty}");
        assert_eq!(ty.block_bytes(), traits.type_size as u64, "{ty}");
        match (can_dequantize(ty), traits.to_float.is_some()) {
            (false, true) => left.push(ty.name()),
            (ours, theirs) => assert!(theirs || !ours || ty == TensorType::F32, "{ty}"),
        }
    }
    assert_eq!(left, ["IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ3_S", "IQ2_S", "IQ1_M"]);
    assert!(TensorType::all().all(|ty| (ty as u32) < sys::GGML_TYPE_COUNT));
}

/// The copy's numbers are those of the decoder.
#[test]
fn the_copy_is_the_dequantized_model() {
    let folder = folder();
    let (from, to) = (folder.path().join("from.gguf"), folder.path().join("to.gguf"));
    let blocks: Vec<u8> = (0..18 * 6).map(|i| (i * 7 % 61) as u8).collect();
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", "llama").set("general.file_type", 2u32);
    writer.tensor("matrix", &[64, 3], TensorType::Q4_0, &blocks[..]).unwrap();
    writer.tensor("whole", &[4], TensorType::I8, vec![1, 2, 3, 4]).unwrap();
    writer.write(&from).unwrap();
    let from = Gguf::open(&from).unwrap();
    assert_eq!(dequantized_bytes(&from), 64 * 3 * 4 + 4);
    write_dequantized(&from, &to).unwrap();
    let to = Gguf::open(&to).unwrap();
    let mut right = vec![0.0; 192];
    dequantize(TensorType::Q4_0, &blocks, &mut right).unwrap();
    assert_eq!(to.to_f32("matrix").unwrap(), right);
    assert_eq!(to.tensor("matrix").unwrap().dims(), [64, 3]);
    assert_eq!(to.data("whole").unwrap(), [1, 2, 3, 4]);
    assert_eq!(to.u32("general.file_type").unwrap(), Some(0));
}

#[test]
fn q8_0_has_the_bytes_of_ggml() {
    let mut rng = Rng(3);
    let mut values: Vec<f32> = (0..4096u32)
        .map(|at| {
            let x = (rng.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            // From subnormal scales to large ones.
            x * 10f32.powi(at as i32 / 32 % 17 - 9)
        })
        .collect();
    // All zeros, halves of a step, and both signs of the largest value.
    values.extend([0.0; 32]);
    values.extend((0..32).map(|at| (at as f32 - 16.0) / 2.0 + if at == 0 { -119.0 } else { 0.0 }));
    values.extend((0..32).map(|at| if at % 2 == 0 { 127.0 } else { -(at as f32) - 0.5 }));
    let ours = quantize_q8_0(&values);
    let mut theirs = vec![0u16; ours.len() / 2];
    // SAFETY: the traits of a type that ggml defines are a constant; `values` are whole blocks, and
    // `theirs` has room for their bytes, aligned as blocks are.
    unsafe {
        let quantize =
            (*sys::ggml_get_type_traits(TensorType::Q8_0 as sys::ggml_type)).from_float_ref;
        let quantize = quantize.expect("ggml has a reference for Q8_0");
        quantize(values.as_ptr(), theirs.as_mut_ptr().cast(), values.len() as i64);
    }
    let theirs: Vec<u8> = theirs.iter().flat_map(|pair| pair.to_ne_bytes()).collect();
    assert!(ours == theirs);
}
