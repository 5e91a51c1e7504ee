//! A single grader (not a `multi`): its name, and a check or a judge. Also parses the graders of a
//! `multi`.

use super::checks::Check;
use super::fields::{Fields, wrong};
use super::formula::{self, Formula};
use super::judges::{Judge, Question};
use super::template::Context;
use super::{Answer, Failed, Fault, Grader, GraderError, MOST_GRADERS};
use serde_json::{Map, Value};

pub(super) const MULTI: &str = "multi";

/// Allowed values of `type`.
const KINDS: &[(&str, &str)] = &[
    ("string_check", "string_check"),
    ("text_similarity", "text_similarity"),
    ("score_model", "score_model"),
    (MULTI, MULTI),
    ("number_match", "number_match"),
    ("json_schema", "json_schema"),
    ("length", "length"),
    ("regex", "regex"),
    ("reward_model", "reward_model"),
];

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Leaf {
    pub name: String,
    work: Work,
}

#[derive(Clone, Debug, PartialEq)]
enum Work {
    Check(Check),
    Judge(Judge),
}

/// Takes a grader's `type`.
pub(super) fn kind(fields: &mut Fields) -> Result<&'static str, GraderError> {
    let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
    match fields.need("type")? {
        Value::String(kind) if kind == "python" => Err(fields.error(
            "type",
            format!("cannot be python: Python is not run here. There are {}", names.join(", ")),
        )),
        value => {
            let found = KINDS.iter().find(|(name, _)| value.as_str() == Some(name));
            let expected = || format!("one of {}", names.join(", "));
            found
                .map(|(_, kind)| *kind)
                .ok_or_else(|| wrong(&fields.path("type"), &expected(), &value))
        }
    }
}

/// Parses a `multi`, whose `type` is taken already. Its graders are an object by key, or a list
/// with names, or a single grader, as in older types of OpenAI's.
pub(super) fn multi(mut fields: Fields) -> Result<Grader, GraderError> {
    let name = fields.name("name")?.unwrap_or_else(|| MULTI.to_owned());
    let path = fields.path("graders");
    let graders = match fields.need("graders")? {
        Value::Object(map) if map.get("type").is_some_and(Value::is_string) => {
            vec![(None, path.clone(), Value::Object(map))]
        }
        Value::Object(map) => map
            .into_iter()
            .map(|(key, value)| {
                let short: String = key.chars().take(100).collect();
                (Some(key), format!("{path}.{short}"), value)
            })
            .collect(),
        Value::Array(list) => {
            let named = |(index, value)| (None, format!("{path}[{index}]"), value);
            list.into_iter().enumerate().map(named).collect()
        }
        other => return Err(wrong(&path, "an object of graders", &other)),
    };
    if !(1..=MOST_GRADERS).contains(&graders.len()) {
        let what = format!("must be 1 to {MOST_GRADERS} graders, got {}", graders.len());
        return Err(fields.error("graders", what));
    }
    let mut leaves: Vec<(String, Leaf)> = Vec::with_capacity(graders.len());
    for (key, path, value) in graders {
        let mut inner = Fields::of(path.clone(), value)?;
        let kind = kind(&mut inner)?;
        if kind == MULTI {
            return Err(inner.error("type", "cannot be multi inside a multi"));
        }
        // With a key the name is optional; without a key the name is the key.
        let (leaf, key, param) = match key {
            Some(key) => (Leaf::parse(kind, &key, inner)?, key, path),
            None => {
                let param = inner.path("name");
                let name = inner.need_name("name")?;
                inner.put_back("name", Value::from(name.as_str()));
                (Leaf::parse(kind, &name, inner)?, name, param)
            }
        };
        let refuse = |what: String| GraderError { message: format!("{param} {what}"), param };
        if !formula::is_variable(&key) {
            return Err(refuse(format!(
                "must be usable in the formula: up to {} letters, digits and _, no digit first, and \
                 no function's name",
                formula::LONGEST_NAME
            )));
        }
        if leaves.iter().any(|(other, _)| *other == key) {
            return Err(refuse(format!("must be unique, there are two of {key}")));
        }
        leaves.push((key, leaf));
    }
    let source = fields.need_string("calculate_output", formula::LONGEST)?;
    let keys: Vec<&str> = leaves.iter().map(|(key, _)| key.as_str()).collect();
    let formula = Formula::parse(source, &keys)
        .map_err(|why| fields.error("calculate_output", format!("is no valid formula: {why}")))?;
    fields.finish()?;
    Ok(Grader { name, leaves, formula: Some(formula) })
}

impl Leaf {
    /// Parses a grader whose `type` is taken already; `name` is its default name.
    pub(super) fn parse(
        kind: &'static str,
        name: &str,
        mut fields: Fields,
    ) -> Result<Self, GraderError> {
        let name = fields.name("name")?.unwrap_or_else(|| name.to_owned());
        let work = match kind {
            "score_model" => Work::Judge(Judge::score(&mut fields)?),
            "reward_model" => Work::Judge(Judge::reward(&mut fields)?),
            _ => Work::Check(Check::parse(kind, &mut fields)?),
        };
        fields.finish()?;
        Ok(Self { name, work })
    }

    pub(super) fn kind(&self) -> &'static str {
        match &self.work {
            Work::Check(check) => check.kind(),
            Work::Judge(judge) => judge.kind(),
        }
    }

    /// The normal form.
    pub(super) fn value(&self) -> Value {
        let mut map = Map::new();
        map.insert("type".to_owned(), self.kind().into());
        map.insert("name".to_owned(), self.name.as_str().into());
        match &self.work {
            Work::Check(check) => check.write(&mut map),
            Work::Judge(judge) => judge.write(&mut map),
        }
        Value::Object(map)
    }

    /// The model that the grader needs, and whether it must be a reward model.
    pub(super) fn model(&self) -> Option<(&str, bool)> {
        match &self.work {
            Work::Check(_) => None,
            Work::Judge(judge) => Some(judge.model()),
        }
    }

    /// The question to the model, if the grader needs one.
    pub(super) fn question(&self, context: &Context<'_>) -> Option<Result<Question, Fault>> {
        match &self.work {
            Work::Check(_) => None,
            Work::Judge(judge) => Some(judge.question(context)),
        }
    }

    /// The value of a grader that needs no model.
    pub(super) fn check(&self, context: &Context<'_>) -> Result<f64, Fault> {
        match &self.work {
            Work::Check(check) => check.value(context),
            Work::Judge(judge) => judge.read(None),
        }
    }

    /// The value of a grader that needs a model, from the model's answer.
    pub(super) fn read(&self, answer: Option<&Result<Answer, Failed>>) -> Result<f64, Fault> {
        match &self.work {
            Work::Check(_) => Ok(0.0),
            Work::Judge(judge) => judge.read(answer),
        }
    }
}
