//! The table of byte-level pre-tokenizers: their definition in `tokenizer.json`, and their names in
//! a GGUF. Conversions in both directions use the table.

use serde_json::{Value as Json, json};

/// Regular expression of words in GPT-4o and related models; `$behind` is the end of a word.
macro_rules! words {
    ($behind:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $behind,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $behind
        )
    };
}

/// Regular expression of cl100k (GPT-4), for a given expression for digits.
macro_rules! cl100k {
    ($digits:literal) => {
        concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
}

/// One step of a pre-tokenizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step<'a> {
    /// Splits off every digit.
    Digits,
    /// Splits into the matches of the expression and the text between them.
    Split(&'a str),
    /// GPT-2's own regular expression.
    Gpt2,
}

/// A row: the name, the steps, and whether a word that is a token becomes that token without
/// merging (`ignore_merges`); `None` if that makes no difference.
type Row = (&'static str, &'static [Step<'static>], Option<bool>);

/// If rows are equal, a folder gets the name of the first. A test compares the table with the
/// native tokenizer.
const TABLE: &[Row] = &[
    ("gpt-2", &[Step::Gpt2], None),
    ("smollm", &[Step::Digits, Step::Gpt2], None),
    ("llama-bpe", &[Step::Split(cl100k!(r"\p{N}{1,3}"))], Some(true)),
    ("dbrx", &[Step::Split(cl100k!(r"\p{N}{1,3}"))], Some(false)),
    ("qwen2", &[Step::Split(cl100k!(r"\p{N}"))], None),
    (
        "gpt-4o",
        &[Step::Split(concat!(
            words!(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
        None,
    ),
    (
        "tekken",
        &[Step::Split(concat!(
            words!(""),
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ))],
        None,
    ),
];

/// Contractions in any case, as some models' expressions spell them out.
const WRITTEN_OUT: &str = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";

/// The `pre_tokenizer` of `tokenizer.json` for a name of a GGUF, and its `ignore_merges`; `None`
/// for a name that is not in the table.
pub fn pre_tokenizer(name: &str) -> Option<(Json, bool)> {
    let (_, steps, whole_words) = TABLE.iter().find(|(known, ..)| *known == name)?;
    let byte_level = |regex: bool| {
        json!({
            "type": "ByteLevel",
            "add_prefix_space": false,
            "trim_offsets": true,
            "use_regex": regex,
        })
    };
    let mut listed = Vec::new();
    for step in *steps {
        listed.push(match step {
            Step::Digits => json!({"type": "Digits", "individual_digits": true}),
            Step::Split(expression) => json!({
                "type": "Split",
                "pattern": {"Regex": expression},
                "behavior": "Isolated",
                "invert": false,
            }),
            Step::Gpt2 => byte_level(true),
        });
    }
    if steps.last() != Some(&Step::Gpt2) {
        listed.push(byte_level(false));
    }
    let json = match listed.len() {
        1 => listed.remove(0),
        _ => json!({"type": "Sequence", "pretokenizers": listed}),
    };
    // A word that is a token results from merges in every tokenizer trained on such words.
    Some((json, whole_words.unwrap_or(name == "tekken")))
}

/// The GGUF name of a `pre_tokenizer`.
///
/// # Errors
/// A description of the unsupported part.
pub(super) fn name_of(json: &Json, ignore_merges: bool) -> Result<&'static str, String> {
    let mut listed = Vec::new();
    flatten(json, &mut listed);
    let mut steps = Vec::new();
    let mut bytes = false;
    for part in &listed {
        match part["type"].as_str().unwrap_or("") {
            "ByteLevel" => {
                bytes = true;
                if part["add_prefix_space"] == true {
                    return Err("ByteLevel with `add_prefix_space`".into());
                }
                // A missing key means true.
                if part["use_regex"] != false {
                    steps.push(Step::Gpt2);
                }
            }
            "Digits" if part["individual_digits"] == true => steps.push(Step::Digits),
            "Split" => steps.push(Step::Split(expression(part)?)),
            other => return Err(format!("`{other}`")),
        }
    }
    if !bytes {
        return Err("a pre-tokenizer without ByteLevel".into());
    }
    let written = |text: &str| text.replace(WRITTEN_OUT, CONTRACTIONS);
    let same = |a: &Step, b: &Step| match (a, b) {
        (Step::Split(a), Step::Split(b)) => written(a) == written(b),
        _ => a == b,
    };
    let found = TABLE.iter().find(|(_, known, whole_words)| {
        known.len() == steps.len()
            && known.iter().zip(&steps).all(|(a, b)| same(a, b))
            && whole_words.is_none_or(|whole_words| whole_words == ignore_merges)
    });
    found.map(|(name, ..)| *name).ok_or_else(|| {
        let shown = |step: &Step| match step {
            Step::Digits => "Digits".to_owned(),
            Step::Split(expression) => format!("Split({expression})"),
            Step::Gpt2 => "ByteLevel".to_owned(),
        };
        let shown: Vec<String> = steps.iter().map(shown).collect();
        format!("`{}`", shown.join(", "))
    })
}

fn flatten<'a>(json: &'a Json, out: &mut Vec<&'a Json>) {
    match json["pretokenizers"].as_array() {
        // A nested sequence inside a sequence is not supported; no known tokenizer has one.
        Some(list) => out.extend(list),
        None => out.push(json),
    }
}

fn expression(part: &Json) -> Result<&str, String> {
    let isolated = part["behavior"] == "Isolated" && part["invert"] != true;
    // Removes text that does not match; but every character matches, so nothing is removed.
    let kept = part["behavior"] == "Removed" && part["invert"] == true;
    match part["pattern"]["Regex"].as_str() {
        Some(expression) if isolated || kept => Ok(expression),
        _ => Err(format!("Split {part}")),
    }
}
