//! Graders that need no model.

use super::fields::Fields;
use super::number::{Marker, NumberMatch};
use super::schema::{Schema, short};
use super::template::{Context, Template, json_of};
use super::text::Metric;
use super::{Fault, Flag, GraderError};
use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

/// Maximum length of a text that is compared or searched, in characters. A comparison takes time
/// proportional to the product of the lengths of both texts, a search to that of text and pattern.
const LONGEST: usize = 64 << 10;
const LONGEST_PATTERN: usize = 4 << 10;
/// Maximum size of a compiled pattern, in bytes. Unicode's larger classes need some 10 KiB each.
const PATTERN_SIZE: usize = 256 << 10;
/// Upper limit of a length bound, longer than any text.
const MOST_LENGTH: i64 = 1 << 30;

/// A grader that needs no model; its value is from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Check {
    String { operation: Operation, input: Template, reference: Template },
    Similarity { metric: Metric, input: Template, reference: Template },
    Number { input: Template, reference: Template, how: NumberMatch },
    Schema { input: Template, schema: Schema },
    Length { input: Template, length: Length },
    Regex { input: Template, pattern: Pattern },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Eq,
    Ne,
    /// The input contains the reference.
    Like,
    /// As `Like`, ignoring case.
    Ilike,
}

const OPERATIONS: &[(&str, Operation)] = &[
    ("eq", Operation::Eq),
    ("ne", Operation::Ne),
    ("like", Operation::Like),
    ("ilike", Operation::Ilike),
];

/// Required length of a text. Outside its bounds the value decreases with the distance and is 0
/// from a distance of `slack` on.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Length {
    unit: Unit,
    min: Option<i64>,
    max: Option<i64>,
    slack: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Characters,
    Words,
}

const UNITS: &[(&str, Unit)] = &[("characters", Unit::Characters), ("words", Unit::Words)];

/// A regular expression of the crate `regex`: without backtracking, so matching takes linear time.
#[derive(Clone, Debug)]
pub(super) struct Pattern(Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Check {
    /// Reads the keys of a kind, except `type` and `name`.
    pub(super) fn parse(kind: &str, fields: &mut Fields) -> Result<Self, GraderError> {
        match kind {
            "string_check" => Ok(Self::String {
                operation: fields.need_one_of("operation", OPERATIONS)?,
                input: fields.template("input")?,
                reference: fields.template("reference")?,
            }),
            "text_similarity" => Ok(Self::Similarity {
                metric: fields.need_one_of("evaluation_metric", Metric::ALL)?,
                input: fields.template("input")?,
                reference: fields.template("reference")?,
            }),
            "number_match" => Ok(Self::Number {
                input: fields.template_or_output("input")?,
                reference: fields.template("reference")?,
                how: NumberMatch {
                    marker: fields.name("marker")?.map(Marker),
                    tolerance: fields.number("tolerance", 0.0..=1e300)?.unwrap_or(1e-6),
                },
            }),
            "json_schema" => {
                let input = fields.template_or_output("input")?;
                let schema = fields.need("schema")?;
                let schema = Schema::compile(schema).map_err(|why| fields.error("schema", why))?;
                Ok(Self::Schema { input, schema })
            }
            "length" => Ok(Self::Length {
                input: fields.template_or_output("input")?,
                length: Length::parse(fields)?,
            }),
            _ => {
                let input = fields.template_or_output("input")?;
                let source = fields.need_string("pattern", LONGEST_PATTERN)?;
                let pattern = Pattern::compile(&source).map_err(|why| {
                    // The preceding lines quote the pattern.
                    let why = why.to_string();
                    let why = short(why.lines().last().unwrap_or_default());
                    fields.error("pattern", format!("must be a pattern: {why}"))
                })?;
                Ok(Self::Regex { input, pattern })
            }
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::String { .. } => "string_check",
            Self::Similarity { .. } => "text_similarity",
            Self::Number { .. } => "number_match",
            Self::Schema { .. } => "json_schema",
            Self::Length { .. } => "length",
            Self::Regex { .. } => "regex",
        }
    }

    /// Writes the keys of the normal form, except `type` and `name`.
    pub(super) fn write(&self, map: &mut Map<String, Value>) {
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        match self {
            Self::String { input, .. }
            | Self::Similarity { input, .. }
            | Self::Number { input, .. }
            | Self::Schema { input, .. }
            | Self::Length { input, .. }
            | Self::Regex { input, .. } => put("input", input.source().into()),
        };
        match self {
            Self::String { operation, reference, .. } => {
                put("reference", reference.source().into());
                put("operation", named(OPERATIONS, *operation));
            }
            Self::Similarity { metric, reference, .. } => {
                put("reference", reference.source().into());
                put("evaluation_metric", named(Metric::ALL, *metric));
            }
            Self::Number { reference, how, .. } => {
                put("reference", reference.source().into());
                if let Some(Marker(marker)) = &how.marker {
                    put("marker", marker.as_str().into());
                }
                put("tolerance", how.tolerance.into());
            }
            Self::Schema { schema, .. } => {
                put("schema", schema.source().clone());
            }
            Self::Length { length, .. } => {
                put("unit", named(UNITS, length.unit));
                if let Some(min) = length.min {
                    put("min", min.into());
                }
                if let Some(max) = length.max {
                    put("max", max.into());
                }
                put("slack", length.slack.into());
            }
            Self::Regex { pattern, .. } => {
                put("pattern", pattern.0.as_str().into());
            }
        }
    }

    /// The value of a sample.
    pub(super) fn value(&self, context: &Context<'_>) -> Result<f64, Fault> {
        let fill = |template: &Template| template.render(context);
        let truth = match self {
            Self::String { operation, input, reference } => {
                operation.holds(&fill(input)?, &fill(reference)?)
            }
            Self::Similarity { metric, input, reference } => {
                let (input, reference) = (fill(input)?, fill(reference)?);
                return Ok(metric.of(bounded(&input)?, bounded(&reference)?));
            }
            Self::Number { input, reference, how } => {
                how.holds(&fill(input)?, &fill(reference)?)?
            }
            Self::Schema { input, schema } => {
                json_of(&fill(input)?).is_some_and(|value| schema.accepts(&value))
            }
            Self::Length { input, length } => return Ok(length.of(&fill(input)?)),
            Self::Regex { input, pattern } => pattern.0.is_match(bounded(&fill(input)?)?),
        };
        Ok(f64::from(u8::from(truth)))
    }
}

impl Operation {
    fn holds(self, input: &str, reference: &str) -> bool {
        match self {
            Self::Eq => input == reference,
            Self::Ne => input != reference,
            Self::Like => input.contains(reference),
            Self::Ilike => input.to_lowercase().contains(&reference.to_lowercase()),
        }
    }
}

impl Length {
    fn parse(fields: &mut Fields) -> Result<Self, GraderError> {
        let unit = fields.need_one_of("unit", UNITS)?;
        let min = fields.integer("min", 0..=MOST_LENGTH)?;
        let max = fields.integer("max", 0..=MOST_LENGTH)?;
        let slack = fields.number("slack", 0.0..=MOST_LENGTH as f64)?.unwrap_or(0.0);
        match (min, max) {
            (None, None) => Err(fields.error("min", "or max must be given")),
            (Some(min), Some(max)) if min > max => {
                Err(fields.error("min", format!("must be at most max, {max}, got {min}")))
            }
            _ => Ok(Self { unit, min, max, slack }),
        }
    }

    fn of(&self, text: &str) -> f64 {
        let length = match self.unit {
            Unit::Characters => text.chars().count(),
            Unit::Words => text.split_whitespace().count(),
        };
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        let below = self.min.map_or(0, |min| min.saturating_sub(length));
        let above = self.max.map_or(0, |max| length.saturating_sub(max));
        match below.max(above) {
            ..=0 => 1.0,
            out if out as f64 >= self.slack => 0.0,
            out => 1.0 - out as f64 / self.slack,
        }
    }
}

impl Pattern {
    fn compile(source: &str) -> Result<Self, regex::Error> {
        let mut builder = RegexBuilder::new(source);
        builder.size_limit(PATTERN_SIZE).dfa_size_limit(PATTERN_SIZE).build().map(Self)
    }
}

/// Checks that a text is short enough to be compared.
fn bounded(text: &str) -> Result<&str, Fault> {
    match text.char_indices().nth(LONGEST) {
        None => Ok(text),
        Some(_) => {
            let why = format!("a text is longer than the {LONGEST} characters that are compared");
            Err(Fault::new(Flag::Other, why))
        }
    }
}

/// The name of a choice.
pub(super) fn named<T: PartialEq>(known: &[(&'static str, T)], what: T) -> Value {
    known.iter().find(|(_, one)| *one == what).map_or(Value::Null, |(name, _)| (*name).into())
}
