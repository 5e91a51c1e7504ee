//! Bad inputs: no text may take more than its length deserves.

use super::{folder, vocabularies};
use crate::engine::tokenizer::Tokenizer;
use crate::engine::tokenizer::native::NativeTokenizer;
use std::time::{Duration, Instant};

const MEGABYTE: usize = 1 << 20;
/// A square would take hours.
const LIMIT: Duration = Duration::from_secs(5);

#[test]
fn a_megabyte_of_anything_takes_seconds() {
    let Some(folder) = folder() else { return };
    let units = [
        "a", " ", "\n", "\t ", "0", "!", "中", "😀", "a ", " \n ", "'s", "<|", "e\u{301}", "Aa",
        "\0",
    ];
    let texts = units.map(|unit| (unit, unit.repeat(MEGABYTE / unit.len())));
    for (name, gguf) in vocabularies(&folder) {
        let Ok(tokenizer) = NativeTokenizer::from_gguf(&gguf) else { continue };
        for (unit, text) in &texts {
            let started = Instant::now();
            let tokens = tokenizer.encode(text, true, true);
            let took = started.elapsed();
            assert!(took < LIMIT, "{name}: {unit:?} took {took:?}");
            assert!(tokens.len() <= text.len() + 2, "{name}: {unit:?}");
        }
    }
}
