//! Difficult texts for a tokenizer, the same in every run.

use crate::gguf::fixture::Rng;

/// Runs of these units exercise the edges of most expressions.
const UNITS: &[&str] = &[
    " ",
    "\n",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "\u{b}",
    "\u{1c}",
    "\0",
    "a",
    "Z",
    "é",
    "ſ",
    "中",
    "ア",
    "각",
    "ا",
    "अ",
    "ก",
    "\u{301}",
    "0",
    "7",
    "²",
    "Ⅷ",
    "٣",
    "!",
    "_",
    "'",
    "\"",
    "$",
    "+",
    "…",
    "。",
    "€",
    "😀",
    "👩\u{200d}👧",
    "🇪🇺",
    "▁",
    "Ġ",
    "\u{e000}",
    "\u{fffd}",
    "\u{feff}",
    "\u{10ffff}",
];
/// Words and fragments of code.
const WORDS: &[&str] = &[
    "the",
    " The",
    "don't",
    "DON'T",
    "we'Ll",
    " it'S",
    "I'd've",
    "'s",
    "'re",
    "x'",
    "HTTPServer",
    "camelCaseWord",
    "snake_case",
    "naïve",
    "Straße",
    "ÇA",
    "ǅ",
    "Москва",
    " нещо",
    "Ελλάδα",
    "שלום",
    "مرحبا",
    "हिन्दी",
    "ไทย",
    "日本語",
    "テスト",
    "한국어",
    "汉字。",
    "３.14",
    "3.14159",
    "1234567",
    " 1,000,000",
    "0xDEADBEEF",
    "12e-5",
    "½",
    "x²",
    "١٢٣٤",
    "fn main() {",
    "    return x;",
    "\t\tif (a != b) {",
    "}\n\n",
    "// ----",
    "==>",
    "!!!",
    "...",
    "?!",
    "</s>",
    "<s>",
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>user\n",
    "<|im_end|>",
    "<0x0A>",
    "[MASK]",
    "<mask>",
    "http://a.b/c?d=e",
    "user@example.com",
    "#tag",
    "@name",
    "C:\\dir\\file",
    "a/b",
    "$100",
    "100%",
    "\\n",
    "IMGIMGABZ",
    "<sentinel:12>",
    "e\u{301}",
    "각",
    "👍🏽",
    "🏴\u{e0067}\u{e0062}",
    "\u{202e}abc\u{202c}",
    "\r",
    "\n ",
    " \n",
    "  ",
    "   \t ",
];

/// Random texts of about `bytes` bytes in total, each of a few hundred bytes.
pub(super) fn texts(bytes: usize) -> Vec<String> {
    let mut rng = Rng(0x70_6b_65_6e);
    let mut texts = Vec::new();
    let mut total = 0;
    while total < bytes {
        let text: String = (0..1 + below(&mut rng, 40)).map(|_| part(&mut rng)).collect();
        total += text.len();
        texts.push(text);
    }
    texts
}

/// Every `stride`-th character of all planes, after a letter and between spaces, in texts of some
/// thousand characters. Planes without letters (4 to 13) and of private use are sampled.
pub(super) fn planes(stride: usize) -> Vec<String> {
    let dense = (0..0x3_2350u32).step_by(stride);
    let sparse = (0x3_2350..0x11_0000u32).step_by(stride * 101);
    let characters: Vec<char> = dense.chain(sparse).filter_map(char::from_u32).collect();
    let around = |part: &[char]| part.iter().map(|c| format!("a{c}1 {c}{c} ")).collect();
    characters.chunks(1000).map(around).collect()
}

fn below(rng: &mut Rng, end: u64) -> u64 {
    rng.next() % end
}

fn pick<'a>(rng: &mut Rng, from: &[&'a str]) -> &'a str {
    from[below(rng, from.len() as u64) as usize]
}

fn part(rng: &mut Rng) -> String {
    match below(rng, 8) {
        0 => pick(rng, UNITS).repeat(1 + below(rng, 40) as usize),
        1 => (0..below(rng, 8)).map(|_| pick(rng, UNITS)).collect(),
        2 => (0..below(rng, 8)).map(|_| character(rng)).collect(),
        3 => (0..below(rng, 20)).map(|_| char::from(32 + below(rng, 95) as u8)).collect(),
        4 => " ".to_owned(),
        _ => pick(rng, WORDS).to_owned(),
    }
}

/// A random character of any plane; commonly used characters are overrepresented.
fn character(rng: &mut Rng) -> char {
    let end = [0x80, 0x250, 0x3000, 0xffff, 0x2_0000, 0x11_0000][below(rng, 6) as usize];
    char::from_u32(below(rng, end) as u32).unwrap_or('\u{fffd}')
}
