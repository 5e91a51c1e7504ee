//! Passes 20,000 mutated files through all code that reads a file. The outcome must be a result or
//! an error: never a panic, never a read past the end (the files are mapped, so that would be a
//! SIGBUS or numbers of a neighbouring tensor), and no allocation out of proportion to the file's
//! size.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use super::alloc::peak;
use super::folder;
use crate::gguf::fixture::{Rng, TinyLlama, tiny_bert, tiny_llama, tiny_peft};
use crate::gguf::{
    Gguf, GgufWriter, KvType, ModelConfig, ModelFacts, TensorType, TokenizerFacts, Value,
    can_dequantize, check_lora_gguf, peft_to_gguf,
};

/// Maximum allocation per byte of the file: one bit becomes an f32, and short strings have lengths,
/// capacities and pointers.
const PER_BYTE: usize = 40;
/// The reader's buffer.
const BUFFER: usize = 64 << 10;
/// Allowance in addition: the reader's buffer, and facts of up to 512 layers.
const BASE: usize = 96 << 10;

#[test]
fn mutated_models_are_read_or_refused() {
    let dir = folder();
    let path = dir.path().join("model.gguf");
    for (rounds, ty, tied) in [(3500, TensorType::F16, true), (2500, TensorType::F32, true)] {
        let options = TinyLlama {
            n_layer: 1,
            n_embd: 32,
            n_head: 2,
            n_head_kv: 1,
            n_ff: 32,
            ty,
            tied,
            ..Default::default()
        };
        tiny_llama(&path, &options).unwrap();
        assert!(ModelConfig::read(&Gguf::open(&path).unwrap()).is_ok(), "kernels run the original");
        assert!(attack(&path, rounds, 1) > rounds / 20);
    }
    tiny_bert(&path).unwrap();
    assert!(attack(&path, 1500, 2) > 50);
}

#[test]
fn mutated_tensors_of_all_types_are_read_or_refused() {
    let dir = folder();
    let path = dir.path().join("types.gguf");
    let mut rng = Rng(3);
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", "llama");
    for ty in TensorType::all() {
        let bytes: Vec<u8> = (0..ty.block_bytes() * 2).map(|_| rng.next() as u8).collect();
        writer.tensor(ty.name(), &[ty.block_size(), 1, 2], ty, bytes).unwrap();
    }
    writer.write(&path).unwrap();
    assert!(attack(&path, 5000, 4) > 200);
}

#[test]
fn mutated_metadata_is_read_or_refused() {
    let dir = folder();
    let path = dir.path().join("values.gguf");
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", "llama").set("split.count", 3u16).set("split.no", 1u16);
    for (key, value) in [
        ("llama.block_count", Value::from(3u32)),
        ("llama.attention.head_count", vec![4u32, 4, 2].into()),
        ("llama.attention.head_count_kv", vec![2i32, 2, 1].into()),
        ("llama.attention.recurrent_layers", vec![true, false, true].into()),
        ("llama.rope.freq_base", 1e4f64.into()),
        ("llama.embedding_length", 64u64.into()),
        ("llama.context_length", 8i64.into()),
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.tokens", ["<s>", "</s>", "", "▁a"].map(str::to_owned).to_vec().into()),
        ("tokenizer.ggml.scores", vec![0.0f32, -1.0, 2.0, f32::NAN].into()),
        ("tokenizer.ggml.token_type", vec![3i8, 3, 1, 1].into()),
        ("tokenizer.ggml.bos_token_id", 0u8.into()),
        ("tokenizer.ggml.add_bos_token", true.into()),
        ("tokenizer.chat_template.tool_use", "{{ x }}".into()),
        ("bytes", vec![1u8, 2, 3].into()),
        ("numbers", vec![1.5f64; 9].into()),
        ("more", vec![u64::MAX, 1].into()),
        ("none", Vec::<i16>::new().into()),
    ] {
        writer.set(key, value);
    }
    writer.tensor_f32("token_embd.weight", &[4, 4], TensorType::F32, vec![1.0; 16]).unwrap();
    writer.write(&path).unwrap();
    assert!(attack(&path, 5000, 5) > 500);
}

#[test]
fn mutated_adapters_are_read_or_refused() {
    let dir = folder();
    let (base, out) = (dir.path().join("base.gguf"), dir.path().join("adapter.gguf"));
    let options = TinyLlama { n_layer: 1, n_embd: 32, n_ff: 32, ..Default::default() };
    tiny_llama(&base, &options).unwrap();
    let base = Gguf::open(&base).unwrap();
    let facts = ModelFacts::read(&base).unwrap();
    tiny_peft(&dir.path().join("peft"), &facts, 2, 6).unwrap();
    peft_to_gguf(&dir.path().join("peft"), &facts, &base, &out).unwrap();
    check_lora_gguf(&out, &base).unwrap();
    let mut right = 0;
    let mut attack = Attack::new(&out, 6);
    for _ in 0..2500 {
        let bytes = attack.mutated();
        let (checked, bytes_allocated) = peak(|| check_lora_gguf(&attack.target, &base));
        right += usize::from(checked.is_ok());
        assert!(bytes_allocated <= PER_BYTE * bytes + BASE, "{bytes_allocated} for {bytes}");
    }
    assert!(right > 50 && right < 2400, "some mutations are harmless, most are not: {right}");
}

/// Reads `rounds` mutations of a file; returns how many were accepted.
fn attack(original: &Path, rounds: usize, seed: u64) -> usize {
    let mut attack = Attack::new(original, seed);
    let (mut accepted, mut worst) = (0, 0.0f64);
    for round in 0..rounds {
        let size = attack.mutated();
        let (read, allocated) = peak(|| exercise(&attack.target));
        accepted += usize::from(read);
        worst = worst.max(allocated.saturating_sub(BUFFER) as f64 / size.max(1) as f64);
        assert!(
            allocated <= PER_BYTE * size + BASE,
            "round {round}, seed {seed}: {allocated} bytes allocated for a file of {size}"
        );
    }
    println!("{accepted} of {rounds} accepted, {worst:.1} bytes allocated for a byte at worst");
    accepted
}

/// Reads everything in the file; returns whether the file was accepted.
fn exercise(path: &Path) -> bool {
    let header = Gguf::open_header(path).is_ok();
    let Ok(gguf) = Gguf::open(path) else {
        assert!(!header, "mapped or not, the answer is the same");
        return false;
    };
    assert!(header);
    if let Ok(facts) = ModelFacts::read(&gguf) {
        let _ = facts.kv_bytes_per_token(KvType::Q8_0) + facts.kv_bytes_per_token(KvType::F16);
        let _ = (facts.is_model(), facts.tokenizer.supports_infill());
    }
    let _ = TokenizerFacts::read(&gguf);
    if let Ok(covered) = ModelConfig::read(&gguf) {
        // Sizes by which a runner allocates memory before it reads a tensor.
        let largest = gguf.tensors().iter().map(|tensor| tensor.elements()).max().unwrap_or(0);
        assert!(covered.layers <= gguf.tensors().len());
        assert!((covered.heads * covered.head_dim) as u64 <= largest, "{covered:?}");
        assert!(covered.ff as u64 <= largest && covered.width as u64 <= largest, "{covered:?}");
    }
    for (key, _) in gguf.metadata() {
        let _ = (gguf.u32(key), gguf.u64(key), gguf.f32(key), gguf.bool(key), gguf.str(key));
        let _ = (gguf.strings(key), gguf.u64s(key));
    }
    for tensor in gguf.tensors() {
        assert_eq!(gguf.data(tensor.name()).unwrap().len() as u64, tensor.bytes());
        assert!(tensor.file_offset() + tensor.bytes() <= gguf.file_size());
        let values = gguf.to_f32(tensor.name());
        assert_eq!(values.is_ok(), can_dequantize(tensor.ty()), "{tensor:?}");
        assert!(values.is_err() || values.unwrap().len() as u64 == tensor.elements());
    }
    true
}

/// Writes seeded mutations of one file.
struct Attack {
    original: Vec<u8>,
    header: usize,
    /// Approximate positions of lengths, counts, types, dimensions and offsets.
    fields: Vec<usize>,
    rng: Rng,
    target: std::path::PathBuf,
}

impl Attack {
    fn new(path: &Path, seed: u64) -> Self {
        let original = fs::read(path).unwrap();
        let gguf = Gguf::open(path).unwrap();
        let header = gguf.data_offset() as usize;
        let mut fields = vec![4, 8, 16];
        let keys = gguf.metadata().map(|(key, _)| key);
        for name in keys.chain(gguf.tensors().iter().map(|tensor| tensor.name())) {
            let bytes = [&(name.len() as u64).to_le_bytes(), name.as_bytes()].concat();
            let at = original.windows(bytes.len()).position(|window| window == bytes);
            let (at, end) = (at.unwrap(), at.unwrap() + bytes.len());
            // A length; then a type and a value, an array's type and count, or dimensions.
            fields.extend([at, end, end + 4, end + 8, end + 12, end + 20, end + 28]);
        }
        let target = path.with_file_name("mutated.gguf");
        Self { original, header, fields, rng: Rng(seed), target }
    }

    fn below(&mut self, end: usize) -> usize {
        (self.rng.next() % end.max(1) as u64) as usize
    }

    /// Writes the next mutation to the target; returns its size.
    fn mutated(&mut self) -> usize {
        let mut bytes = self.original.clone();
        for _ in 0..=self.below(3) {
            self.mutate(&mut bytes);
        }
        // Not truncated to zero first, because that makes some file systems flush.
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(false).open(&self.target).unwrap();
        file.write_all(&bytes).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        bytes.len()
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let anywhere = self.below(bytes.len());
        let in_header = self.below(self.header.min(bytes.len()));
        match self.below(16) {
            0 if !bytes.is_empty() => bytes[anywhere] = self.rng.next() as u8,
            1..=4 if !bytes.is_empty() => bytes[in_header] ^= 1 << self.below(8),
            5 => bytes.truncate(anywhere),
            6 => bytes.truncate(in_header),
            7 => {
                let count = self.below(16).min(bytes.len() - anywhere);
                bytes.drain(anywhere..anywhere + count);
            }
            8 => {
                let count = self.below(64).min(bytes.len() - in_header);
                let again = bytes[in_header..in_header + count].to_vec();
                bytes.splice(in_header..in_header, again);
            }
            _ => {
                let which = self.below(self.fields.len());
                let field = self.fields[which];
                self.overwrite(bytes, field);
            }
        }
    }

    /// Sets a field of four or eight bytes to a value that tests sums, products and loops.
    fn overwrite(&mut self, bytes: &mut [u8], at: usize) {
        const EXTREMES: [u64; 20] = [
            0,
            1,
            2,
            3,
            8,
            9,
            31,
            32,
            0xff,
            1 << 16,
            1 << 24,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 32,
            1 << 40,
            1 << 62,
            i64::MAX as u64,
            1 << 63,
            u64::MAX,
        ];
        let mut value = EXTREMES[self.below(EXTREMES.len())];
        if self.below(4) == 0 {
            value = value.wrapping_add(self.rng.next() % 65).wrapping_sub(32);
        }
        let at = at.min(bytes.len());
        let end = (at + 4 + 4 * self.below(2)).min(bytes.len());
        bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
    }
}
