//! The table of pre-tokenizers: the expressions that split a text into words, by
//! `tokenizer.ggml.pre`.
//!
//! Source: `llm_tokenizer_bpe` and `llama_vocab::impl::load` in `src/llama-vocab.cpp`. The
//! expressions are those that llama.cpp applies, which are not always those of the model's authors:
//! llama.cpp does not distinguish the case of letters (it treats `\p{Lu}`, `\p{Ll}`, … as `\p{L}`),
//! and where it uses code instead of an expression, the expression here is equivalent to that code.

/// One splitting rule. [`Splitter`](super::split::Splitter) applies a list of them in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Splits into the matches and the text between them.
    Match(&'static str),
    /// As `Match`, with `|\s+(?!\S)|\s+` appended to the expression.
    Words(&'static str),
    /// As `Match`, with `|\s{512}(?!\S)|\s{256}(?!\S)|…|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}` appended.
    Halves(&'static str),
    /// Splits numbers into groups of three digits from the right.
    Threes,
    /// Splits at `(?=(\d{3})+(?!\d))`.
    AsciiThrees,
}

/// The initial units of merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Units {
    /// Bytes, each written as a character of GPT-2's alphabet.
    Bytes,
    /// Characters, with a space as U+2581; a character that is not a token becomes bytes
    /// (`<0x0A>`).
    Characters,
    /// As `Characters`, but a run of newlines that is a token becomes that token.
    Lines,
    /// As `Characters`, and every word starts with U+2581.
    Metaspace,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pre {
    pub steps: &'static [Step],
    pub units: Units,
    /// Whether a word that is a token becomes that token without merging (`ignore_merges`).
    pub whole_words: bool,
}

impl Pre {
    const fn new(steps: &'static [Step]) -> Self {
        Self { steps, units: Units::Bytes, whole_words: false }
    }

    const fn whole_words(self) -> Self {
        Self { whole_words: true, ..self }
    }

    const fn of(units: Units) -> Self {
        Self { steps: &[Match(r"[^\n]+|[\n]+")], units, whole_words: false }
    }

    /// The row for a name that llama.cpp knows; `None` if the name is not in the table.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "" | "default" => Self::new(DEFAULT),
            "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" | "jina-v5-nano" | "glm4" | "glm5" => {
                Self::new(LLAMA3).whole_words()
            }
            "dbrx" | "smaug-bpe" | "chatglm-bpe" => Self::new(LLAMA3),
            "minicpm5" => Self::new(MINICPM5).whole_words(),
            "jais-2" => Self::new(JAIS2),
            "deepseek-llm" => Self::new(DEEPSEEK_LLM),
            "deepseek-coder" => Self::new(DEEPSEEK_CODER),
            "deepseek-v3" | "hunyuan-dense" | "joyai-llm" | "hy_v4" => Self::new(DEEPSEEK3),
            "spark2_5" => Self::new(SPARK2_5),
            "youtu" => Self::new(YOUTU).whole_words(),
            "falcon" => Self::new(FALCON),
            "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone"
            | "minerva-7b" | "mellum2" => Self::new(STARCODER),
            "gpt-2" | "phi-2" | "jina-es" | "jina-de" | "gigachat" | "jina-v2-es"
            | "jina-v2-de" | "a.x-4.0" | "mellum" | "modern-bert" | "jina-v1-en"
            | "jina-v2-code" | "roberta-bpe" | "mpt" | "olmo" | "jais" | "trillion"
            | "granite-docling" | "exaone4" => Self::new(GPT2),
            "qwen2" | "deepseek-r1-qwen" | "kormo" | "f2llmv2" | "megrez" | "stablelm2"
            | "hunyuan" | "solar-open" | "grok-2" => Self::new(QWEN2),
            "qwen35" => Self::new(QWEN35),
            "poro-chat" | "bloom" | "gpt3-finnish" => Self::new(BLOOM),
            "viking" => Self::new(VIKING),
            "tekken" => Self::new(TEKKEN).whole_words(),
            "chameleon" => Self::new(CHAMELEON),
            "gpt-4o" | "llama4" | "kanana2" | "talkie" | "minimax-m2" => Self::new(GPT4O),
            "granite-embed-multi-97m" => Self::new(GRANITE_EMBED).whole_words(),
            "tiny_aya" | "cohere2moe" => Self::new(TINY_AYA),
            "kimi-k2" => Self::new(KIMI_K2),
            "superbpe" => Self::new(SUPERBPE),
            "bailingmoe" | "bailingmoe2" | "llada-moe" => Self::new(BAILINGMOE),
            "seed-coder" => Self::new(SEED_CODER),
            "ufakzeka" => Self::new(UFAKZEKA),
            "afmoe" => Self::new(AFMOE),
            "laguna" => Self::new(LAGUNA),
            "exaone-moe" => Self::new(EXAONE_MOE),
            "sarvam-moe" => Self::of(Units::Characters),
            "gemma4" | "granite-embed-multi-311m" => Self::of(Units::Lines),
            "mmbert" => Self::of(Units::Metaspace),
            _ => return None,
        })
    }
}

use Step::{AsciiThrees, Halves, Match, Threes, Words};

/// English contractions as GPT-2 splits them, and in any case.
macro_rules! contractions {
    () => {
        r"'s|'t|'re|'ve|'m|'ll|'d"
    };
    (any case) => {
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    };
}

/// GPT-2's classes: contractions, letters, digits, the rest.
macro_rules! gpt2 {
    () => {
        Words(concat!(contractions!(), r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"))
    };
}

/// The classes of cl100k (GPT-4), with a given expression for digits.
macro_rules! cl100k {
    ($digits:literal) => {
        concat!(
            contractions!(any case),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        )
    };
}

/// The classes of o200k (GPT-4o), with given letters that may start a word and that may end it, and
/// a given expression after them.
macro_rules! o200k {
    ($start:literal, $end:literal, $behind:expr, $digits:literal) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?",
            $start,
            "*",
            $end,
            "+",
            $behind,
            "|",
            r"[^\r\n\p{L}\p{N}]?",
            $start,
            "+",
            $end,
            "*",
            $behind,
            "|",
            $digits,
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
        )
    };
}

/// ASCII punctuation before letters, letters with marks, punctuation: DeepSeek 3 and its variants.
macro_rules! deepseek3 {
    ($behind:literal) => {
        concat!(
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"##,
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+",
            $behind
        )
    };
}

/// The range from U+0800 on includes white space, which llama.cpp replaces before matching.
const CJK_WITHOUT_SPACES: Step = Match(r"[[一-龥ࠀ-一가-퟿]&&\S]+");
const KANJI_AND_KANA: Step = Match("[一-龥぀-ゟ゠-ヿ]+");

const DEFAULT: &[Step] =
    &[Match(r"[\p{P}\$\+<=>\^~\|]+"), gpt2!(), Match(r"\p{N}+"), Match("[0-9][0-9][0-9]")];
const GPT2: &[Step] = &[gpt2!()];
const STARCODER: &[Step] = &[Match(r"\p{N}"), gpt2!()];
const FALCON: &[Step] = &[Match(r"[\p{P}\$\+<=>\^~\|`]+"), gpt2!(), Match("[0-9][0-9][0-9]")];
const CHAMELEON: &[Step] = &[
    Match("<sentinel:[0-9]+>"),
    Match("(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"),
    Match(r"([\t\n]|    |  )"),
    Match(r"\p{N}"),
    Match(r"[\p{P}!-/:-@\[-`{-~]"),
    gpt2!(),
];

const LLAMA3: &[Step] = &[Words(cl100k!(r"\p{N}{1,3}"))];
const JAIS2: &[Step] = &[Halves(cl100k!(r"\p{N}{1,3}"))];
const QWEN2: &[Step] = &[Words(cl100k!(r"\p{N}"))];
const MINICPM5: &[Step] = &[Match(r"\p{N}{1,3}"), Words(cl100k!(r"\p{N}+"))];
const LAGUNA: &[Step] = &[Match(r"[^\n]+|[\n]+"), Words(cl100k!(r"\p{N}"))];
const QWEN35: &[Step] = &[Words(concat!(
    contractions!(any case),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
))];
const UFAKZEKA: &[Step] =
    &[Words(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+")];
const SEED_CODER: &[Step] = &[Words(concat!(
    contractions!(any case),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
))];
const BAILINGMOE: &[Step] = &[Words(concat!(
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"
))];
const EXAONE_MOE: &[Step] = &[Words(concat!(
    contractions!(any case),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]"
))];

// Letters without case, and all non-ASCII letters, may be on either side.
const TEKKEN: &[Step] = &[Words(o200k!(r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]", "", r"\p{N}"))];
const GPT4O: &[Step] = &[Words(o200k!(
    r"[\p{L}&&[^a-z]]",
    r"[\p{L}&&[^A-Z]]",
    concat!(contractions!(any case), "?"),
    r"\p{N}{1,3}"
))];
const GRANITE_EMBED: &[Step] = &[Words(o200k!(
    r"[[\p{L}\p{M}]&&[^a-z]]",
    r"[[\p{L}\p{M}]&&[^A-Z]]",
    concat!(contractions!(any case), "?"),
    r"\p{N}{1,3}"
))];
const TINY_AYA: &[Step] = &[
    Threes,
    Words(o200k!(
        r"[\p{L}\p{M}]",
        r"[\p{L}\p{M}]",
        concat!(contractions!(any case), "?"),
        r"\p{N}{1,3}"
    )),
];
const YOUTU: &[Step] = &[
    Match("[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"),
    Words(o200k!(
        r"[\p{L}\p{M}]",
        r"[\p{L}\p{M}]",
        concat!(contractions!(any case), "?"),
        r"\p{N}"
    )),
];

/// Chinese characters as defined by `unicode_cpt_is_han`.
macro_rules! han {
    () => {
        concat!(
            r"\u{4E00}-\u{9FFF}\u{3400}-\u{4DBF}\u{20000}-\u{2A6DF}\u{2A700}-\u{2B73F}",
            r"\u{2B740}-\u{2B81F}\u{2B820}-\u{2CEAF}\u{2CEB0}-\u{2EBEF}\u{F900}-\u{FAFF}",
            r"\u{2F800}-\u{2FA1F}"
        )
    };
}
const KIMI_K2: &[Step] = &[Words(concat!(
    "[",
    han!(),
    r"]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^",
    han!(),
    "]]+",
    contractions!(any case),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
))];

const DEEPSEEK3: &[Step] =
    &[Match(r"\p{N}{1,3}"), KANJI_AND_KANA, Words(deepseek3!(r"[\r\n]*|\s*[\r\n]+"))];
const SPARK2_5: &[Step] =
    &[Match(r"\p{N}{1,3}"), KANJI_AND_KANA, Words(deepseek3!(r"|[\r\n]")), Match(r"\p{N}")];
const AFMOE: &[Step] = &[
    Threes,
    Match("[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"),
    Words(deepseek3!(r"[\r\n]*|\s*[\r\n]+")),
];
const DEEPSEEK_CODER: &[Step] = &[
    Match(r"[\r\n]"),
    Match(r"\s?\p{L}+"),
    Match(r"\s?\p{P}+"),
    CJK_WITHOUT_SPACES,
    Match(r"\p{N}"),
];

/// The list of cased letters in DeepSeek's first model.
macro_rules! cased_letters {
    () => {
        concat!(
            "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽ",
            "ᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ί",
            "ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇ",
            "Ꞌ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
        )
    };
}
const DEEPSEEK_LLM: &[Step] = &[
    Match(r"[\r\n]"),
    Match(concat!(r"\s?[", cased_letters!(), "]+")),
    Match(r"\s?[!-/:-~！-／：-～‘-‟、-。]+"),
    Match(r"\s+$"),
    CJK_WITHOUT_SPACES,
    Match(r"\p{N}+"),
];

const BLOOM: &[Step] = &[Match(r" ?[^(\s|.,!?…。，、।۔،)]+")];
const VIKING: &[Step] = &[Match(r" ?[^(\s|.,!?…。，、।۔،)]+"), Match(r"\p{N}")];
const SUPERBPE: &[Step] = &[Match(r"\p{N}+"), AsciiThrees];
