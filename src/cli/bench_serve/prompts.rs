//! Prompts of random words: the same for the same seed, different for every request.

use super::super::CliError;
use super::super::http::{HttpError, Server};
use super::{BenchServeOptions, Endpoint};
use bytes::Bytes;
use hyper::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// Common words, nearly all of them one token in the vocabularies of today's models.
const WORDS: &str = "the of and to in a is that for it as was with be by on not he his but at are \
    this have from or had an they which one you were her all she there would their we him been has \
    when who will more no if out so said what up its about into than them can only other new some \
    could time these two may then do first any my now such like our over man me even most made after \
    also did many before must through back years where much your way well down should because each \
    just those people how too little state good very make world still own see men work long get here \
    between both life being under never day same another know while last might us great old year off \
    come since against go came right used take three states himself few house use during without \
    again place american around however home small found thought went say part once general high \
    upon school every does got united left number course war until always away something fact water \
    less public put thing almost hand enough far took head yet government system better set told \
    nothing night end why called eyes find going look asked later knew point next program city \
    business give group toward young days let room word side social given present several order";

/// How many words make a prompt, and what they are sent as.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Prompts {
    pub words: u32,
    pub shared_words: u32,
    /// Tokens of one word, where they were measured.
    pub tokens_per_word: Option<f64>,
    seed: u64,
    share: f64,
    endpoint: Endpoint,
    output_tokens: u32,
    ignore_eos: bool,
}

impl Prompts {
    /// Settles the number of words; lengths in tokens are measured with two trial requests.
    pub(super) async fn prepare(
        options: &BenchServeOptions,
        server: &Server,
        model: &str,
    ) -> Result<Self, CliError> {
        let mut prompts = Self {
            words: options.prompt_words.max(1),
            shared_words: options.shared_prefix_words,
            tokens_per_word: None,
            seed: options.seed,
            share: options.shared_prefix_share,
            endpoint: options.endpoint,
            output_tokens: options.output_tokens.max(1),
            ignore_eos: options.ignore_eos,
        };
        let in_tokens =
            [options.prompt_tokens, options.shared_prefix_tokens, options.probe_prompt_tokens];
        if in_tokens.iter().all(Option::is_none) {
            return Ok(prompts);
        }
        // The difference of two lengths leaves out what the chat template adds.
        let failed = |error: HttpError| {
            CliError::message(format!("The trial request for the prompt's length failed: {error}."))
        };
        let short = prompts.count(server, model, 16).await.map_err(failed)?;
        let long = prompts.count(server, model, 272).await.map_err(failed)?;
        let per_word = (long - short) / 256.0;
        if !(0.2..20.0).contains(&per_word) {
            let text = "The server reports no usable usage.prompt_tokens: give the length in words \
                        (--prompt-words, --shared-prefix-words).";
            return Err(CliError::message(text));
        }
        let words = |tokens: u32| ((f64::from(tokens) / per_word).round() as u32).max(1);
        prompts.words = options.prompt_tokens.map_or(prompts.words, words);
        prompts.shared_words = options.shared_prefix_tokens.map_or(prompts.shared_words, words);
        prompts.tokens_per_word = Some(per_word);
        Ok(prompts)
    }

    async fn count(&self, server: &Server, model: &str, words: u32) -> Result<f64, HttpError> {
        let mut body = self.value(model, &random_words(words, self.seed ^ 0x5eed), 1);
        body["stream"] = json!(false);
        if let Some(object) = body.as_object_mut() {
            object.remove("stream_options");
        }
        let answer = server.json(Method::POST, self.path(), Some(body.to_string().into())).await?;
        Ok(answer["usage"]["prompt_tokens"].as_f64().unwrap_or(0.0))
    }

    /// The path of the endpoint.
    pub(super) fn path(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
        }
    }

    /// The body of request `index` of a repetition.
    pub(super) fn body(&self, model: &str, repetition: u32, index: u32) -> Bytes {
        let key = self.seed.wrapping_mul(1_000_003).wrapping_add(u64::from(repetition));
        let mut text = String::new();
        // Every k-th request has the prefix, as evenly as the share allows.
        let due = |n: u32| (f64::from(n) * self.share).floor() as u32;
        if self.shared_words > 0 && due(index + 1) > due(index) {
            text = random_words(self.shared_words, !key);
            text.push(' ');
        }
        text += &random_words(self.words, (key << 32) ^ u64::from(index + 1));
        self.value(model, &text, self.output_tokens).to_string().into()
    }

    /// The body of a long prompt that asks for one token.
    pub(super) fn probe_body(&self, model: &str, tokens: u32, repetition: u32) -> Bytes {
        let words = (f64::from(tokens) / self.tokens_per_word.unwrap_or(1.0)).round() as u32;
        let key = self.seed.wrapping_add(u64::from(repetition)) ^ 0x70_72_6f_62_65;
        self.value(model, &random_words(words.max(1), key), 1).to_string().into()
    }

    fn value(&self, model: &str, text: &str, max_tokens: u32) -> Value {
        let mut body = json!({
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.endpoint {
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": text}]),
            Endpoint::Completions => body["prompt"] = json!(text),
        }
        if self.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        body
    }
}

fn random_words(count: u32, seed: u64) -> String {
    let words: Vec<&str> = WORDS.split_whitespace().collect();
    let mut random = StdRng::seed_from_u64(seed);
    let mut text = String::with_capacity(count as usize * 6);
    for index in 0..count {
        if index > 0 {
            text.push(' ');
        }
        text.push_str(words[random.random_range(0..words.len())]);
    }
    text
}
