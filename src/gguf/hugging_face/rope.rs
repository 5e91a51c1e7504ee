//! RoPE settings: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5.

use super::ConvertError;
use super::config::{Config, Key};
use crate::gguf::Value;
use serde_json::Value as Json;
use std::f64::consts::PI;

/// RoPE settings of a GGUF.
pub(super) struct Rope {
    pub keys: Vec<(Key, Value)>,
    /// Tensors whose elements divide the frequencies.
    pub tensors: Vec<(&'static str, Vec<f32>)>,
}

/// Reads the settings of a model whose heads have `dims` rotated elements. If layers differ, these
/// are the settings of the layers with full attention.
pub(super) fn rope(
    config: &Config,
    architecture: &str,
    dims: u64,
    lacking: &mut Vec<String>,
) -> Result<Rope, ConvertError> {
    let scaling = parameters(config, "full_attention")?;
    let default = if architecture == "gemma3" { 1e6 } else { 1e4 };
    let base = theta(config, scaling.as_ref())?.unwrap_or(default);
    let mut rope = Rope {
        keys: vec![
            ("rope.dimension_count", dims32(dims)),
            ("rope.freq_base", (base as f32).into()),
        ],
        tensors: Vec::new(),
    };
    if architecture == "gemma3" {
        let local = match parameters(config, "sliding_attention")? {
            Some(local) if config.object("rope_parameters")?.is_some() => {
                local.positive("rope_theta")?
            }
            _ => config.positive("rope_local_base_freq")?,
        };
        // A value that every reader assumes is not written.
        if let Some(local) = local.filter(|local| *local != 1e4) {
            rope.keys.push(("rope.freq_base_swa", (local as f32).into()));
        }
    }
    let Some(scaling) = scaling else { return Ok(rope) };
    let kind = scaling.text("rope_type")?.or(scaling.text("type")?).unwrap_or("default");
    match (kind, architecture) {
        ("default", _) => {}
        ("linear", _) => linear(&scaling, &mut rope)?,
        ("yarn", _) => yarn(config, &scaling, &mut rope)?,
        ("llama3", "llama") => {
            let factors = llama3(&scaling, base, dims)?;
            rope.tensors.push(("rope_freqs.weight", factors));
        }
        ("longrope" | "su", "phi3") => longrope(config, &scaling, dims, &mut rope)?,
        ("dynamic", _) => lacking.push(
            "positions past `max_position_embeddings` are not stretched: a GGUF cannot say rope of \
             type `dynamic`"
                .to_owned(),
        ),
        _ => {
            return Err(config.wrong(format!(
                "rope of type `{kind}` is not carried over for `{architecture}`; what is: default, \
                 linear, yarn, llama3 (Llama), longrope (Phi-3)"
            )));
        }
    }
    Ok(rope)
}

fn dims32(dims: u64) -> Value {
    (dims as u32).into()
}

/// The scaling of positions; for one kind of layers if kinds differ.
fn parameters<'a>(config: &Config<'a>, kind: &str) -> Result<Option<Config<'a>>, ConvertError> {
    match config.object("rope_parameters")? {
        Some(parameters) => match parameters.get(kind) {
            Some(Json::Object(_)) => parameters.object(kind),
            _ => Ok(Some(parameters)),
        },
        None => config.object("rope_scaling"),
    }
}

fn theta(config: &Config, scaling: Option<&Config>) -> Result<Option<f64>, ConvertError> {
    let inner = scaling.map(|scaling| scaling.positive("rope_theta")).transpose()?.flatten();
    Ok(inner.or(config.positive("rope_theta")?))
}

fn linear(scaling: &Config, rope: &mut Rope) -> Result<(), ConvertError> {
    let factor = scaling.needed("factor")?;
    rope.keys.push(("rope.scaling.type", "linear".into()));
    rope.keys.push(("rope.scaling.factor", (factor as f32).into()));
    Ok(())
}

/// Context length in tokens before it was extended.
fn original(config: &Config, scaling: &Config) -> Result<u64, ConvertError> {
    let key = "original_max_position_embeddings";
    match scaling.number(key)?.or(config.number(key)?).or(config.number("max_position_embeddings")?)
    {
        Some(tokens) => Ok(tokens),
        None => Err(config.wrong(format!("`{key}` is missing"))),
    }
}

/// YaRN (arXiv:2309.00071). Readers of a GGUF apply the factor `0.1 ln(factor) + 1` themselves.
fn yarn(config: &Config, scaling: &Config, rope: &mut Rope) -> Result<(), ConvertError> {
    let factor = scaling.needed("factor")?;
    if scaling.flag("truncate")? == Some(false) {
        return Err(config.wrong("a YaRN with `truncate` false is not carried over"));
    }
    let usual = |scale: f64| if factor > 1.0 { 0.1 * scale * factor.ln() + 1.0 } else { 1.0 };
    let scales = (scaling.positive("mscale")?, scaling.positive("mscale_all_dim")?);
    let wanted = match (scaling.positive("attention_factor")?, scales) {
        (Some(wanted), _) => wanted,
        (None, (Some(one), Some(all))) => usual(one) / usual(all),
        _ => usual(1.0),
    };
    rope.keys.push(("rope.scaling.type", "yarn".into()));
    rope.keys.push(("rope.scaling.factor", (factor as f32).into()));
    let original = original(config, scaling)?;
    rope.keys.push(("rope.scaling.original_context_length", (original as u32).into()));
    if wanted != usual(1.0) {
        rope.keys.push(("rope.scaling.attn_factor", ((wanted / usual(1.0)) as f32).into()));
    }
    for (theirs, ours) in
        [("beta_fast", "rope.scaling.yarn_beta_fast"), ("beta_slow", "rope.scaling.yarn_beta_slow")]
    {
        if let Some(beta) = scaling.positive(theirs)? {
            rope.keys.push((ours, (beta as f32).into()));
        }
    }
    Ok(())
}

/// Divisors of the frequencies in Llama 3.1, one per pair.
fn llama3(scaling: &Config, base: f64, dims: u64) -> Result<Vec<f32>, ConvertError> {
    let factor = scaling.needed("factor")?;
    let low = scaling.needed("low_freq_factor")?;
    let high = scaling.needed("high_freq_factor")?;
    let original = scaling.needed("original_max_position_embeddings")?;
    if high <= low {
        return Err(scaling.wrong("`high_freq_factor` must be greater than `low_freq_factor`"));
    }
    let factor_of = |pair: u64| {
        let wavelength = 2.0 * PI * base.powf(2.0 * pair as f64 / dims as f64);
        if wavelength < original / high {
            return 1.0;
        }
        if wavelength > original / low {
            return factor as f32;
        }
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
    };
    Ok((0..dims / 2).map(factor_of).collect())
}

/// LongRoPE (arXiv:2402.13753), in Phi-3's variant.
fn longrope(
    config: &Config,
    scaling: &Config,
    dims: u64,
    rope: &mut Rope,
) -> Result<(), ConvertError> {
    let (original, context) =
        (original(config, scaling)? as f64, config.number("max_position_embeddings")?);
    let stretch = context.map_or(1.0, |context| context as f64 / original);
    let usual = if stretch > 1.0 { (1.0 + stretch.ln() / original.ln()).sqrt() } else { 1.0 };
    let magnitude = scaling.positive("attention_factor")?.unwrap_or(usual);
    rope.keys.push(("rope.scaling.original_context_length", (original as u32).into()));
    rope.keys.push(("rope.scaling.attn_factor", (magnitude as f32).into()));
    for (theirs, ours) in
        [("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")]
    {
        let listed = scaling.get(theirs).and_then(Json::as_array);
        let numbers = listed.map(|list| list.iter().filter_map(Json::as_f64).collect::<Vec<_>>());
        let fits = |list: &Vec<f64>| {
            list.len() as u64 == dims / 2 && list.iter().all(|x| x.is_finite() && *x > 0.0)
        };
        match numbers.filter(fits) {
            Some(list) => rope.tensors.push((ours, list.iter().map(|x| *x as f32).collect())),
            None => {
                let half = dims / 2;
                return Err(scaling.wrong(format!("`{theirs}` must list {half} positive numbers")));
            }
        }
    }
    Ok(())
}
