//! The template engine: minijinja with the behaviour of transformers' jinja2 environment.
//!
//! Semantics follow `_compile_jinja_template` of transformers: an immutable sandbox with
//! `trim_blocks`, `lstrip_blocks` and loop controls, `raise_exception`, `strftime_now`, and a
//! `tojson` that is `json.dumps(…, ensure_ascii=False)` without HTML escaping.

use std::fmt::{self, Write as _};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior};

use super::python::{self, JsonStyle, TextError};
use super::{TemplateError, clock, methods, scan};

/// Stack of the thread that compiles or renders, in bytes. Only touched pages are committed. The
/// stack must suffice to print and drop values of the greatest nesting that the fuel allows.
const STACK: usize = 256 << 20;

/// Work limit of one render, in minijinja's unit (about an instruction, or 64 bytes of text).
const FUEL: u64 = 1_000_000;

/// Name of the variable that carries the time of a render to `strftime_now`.
pub(super) const NOW: &str = "__ingot_now";

/// Carries a template's own `raise_exception` message through minijinja's error chain.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// Error for an output larger than [`python::MAX_TEXT`].
#[derive(Debug, thiserror::Error)]
#[error("the output is too long")]
struct OutputLimit;

/// Compiled templates of one model, by name.
pub(super) struct Engine {
    env: Environment<'static>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Engine")
    }
}

impl Engine {
    /// Compiles `(name, source)` pairs.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`] if a source is too large or does not parse.
    pub(super) fn compile(templates: &[(&'static str, &str)]) -> Result<Engine, TemplateError> {
        let mut prepared = Vec::with_capacity(templates.len());
        for (name, source) in templates {
            prepared.push((*name, scan::prepare(source)?));
        }
        on_large_stack(move || {
            let mut env = environment();
            for (name, source) in prepared {
                env.add_template_owned(name, source)
                    .map_err(|error| TemplateError::Invalid(describe(&error)))?;
            }
            Ok(Engine { env })
        })
    }

    /// Renders a template; `context` is built on the rendering thread.
    pub(super) fn render(
        &self,
        name: &str,
        input_bytes: usize,
        context: impl FnOnce() -> Value + Send,
    ) -> Result<String, TemplateError> {
        on_large_stack(|| {
            let mut env = self.env.clone();
            env.set_fuel(Some(FUEL + input_bytes.min(python::MAX_TEXT) as u64 / 8));
            let template = env.get_template(name).map_err(classify)?;
            let mut out = Limited(Vec::new());
            template.render_captured_to(context(), &mut out).map_err(classify)?;
            String::from_utf8(out.0).map_err(|_| TemplateError::Failed("not UTF-8".into()))
        })
    }
}

/// Runs `work` on a thread whose stack suffices for any nesting within the limits.
fn on_large_stack<T: Send>(
    work: impl FnOnce() -> Result<T, TemplateError> + Send,
) -> Result<T, TemplateError> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("template".into())
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| TemplateError::Exhausted(format!("no thread: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(TemplateError::Failed("the template engine failed".into())))
    })
}

/// A byte sink that fails beyond the output limit.
struct Limited(Vec<u8>);

impl std::io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > python::MAX_TEXT {
            return Err(std::io::Error::other(OutputLimit));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_debug(false);
    env.set_formatter(|out, _, value| match value.kind() {
        ValueKind::Undefined => Ok(()),
        _ => match value.as_str() {
            Some(text) => out.write_str(text).map_err(Error::from),
            None => out.write_str(&python::to_str(value).map_err(text_error)?).map_err(Error::from),
        },
    });
    env.set_unknown_method_callback(methods::call);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python::to_str(value).map_err(text_error));
    env.add_filter("trim", methods::trim);
    env.add_filter("indent", methods::indent);
    // jinja2's tests use Python's protocols: `iter(x)`, `len(x)` and `x[…]`, `isinstance(x,
    // Number)`.
    let is_sequence = |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | Iterable | Map | String | Undefined)
    };
    env.add_test("iterable", is_sequence);
    env.add_test("sequence", is_sequence);
    env.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    env.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        Err(raise(python::to_str(&message).map_err(text_error)?))
    });
    env.add_function("strftime_now", |state: &State, format: &str| {
        let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or_default();
        clock::strftime(format, now)
    });
    env
}

fn raise(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message))
}

/// The minijinja error for a value that cannot be written as text.
pub(super) fn text_error(error: TextError) -> Error {
    match error {
        TextError::TooLong => {
            Error::new(ErrorKind::WriteFailure, "value is too long").with_source(OutputLimit)
        }
        TextError::NotJson(kind) => Error::new(
            ErrorKind::InvalidOperation,
            format!("Object of type {kind} is not JSON serializable"),
        ),
    }
}

/// transformers' `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(
    state: &State,
    value: &Value,
    args: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        match args.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_true();
    let indent = argument(1, "indent")?;
    let indent = match indent.kind() {
        ValueKind::Undefined | ValueKind::None => None,
        ValueKind::String => indent.as_str().map(str::to_owned),
        ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        _ => Some(" ".repeat(indent.as_i64().unwrap_or(0).clamp(0, 64) as usize)),
    };
    let separators = argument(2, "separators")?;
    let separators = match separators.is_none() || separators.is_undefined() {
        true => None,
        false => {
            let part = |index| -> Result<String, Error> {
                python::to_str(&separators.get_item_by_index(index)?).map_err(text_error)
            };
            Some((part(0)?, part(1)?))
        }
    };
    let sort_keys = argument(3, "sort_keys")?.is_true();
    kwargs.assert_all_used()?;
    let style = JsonStyle { ensure_ascii, indent, separators, sort_keys };
    let text = python::to_json(value, &style).map_err(text_error)?;
    state.consume_fuel(text.len() as u64 / 16)?;
    Ok(text)
}

/// Classifies a rendering error: refused by the template, limit exceeded, or failed.
fn classify(error: Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(raised) = cause.downcast_ref::<Raised>() {
            return TemplateError::Refused(raised.0.clone());
        }
        if cause.is::<OutputLimit>() {
            return TemplateError::Exhausted(OutputLimit.to_string());
        }
        if let Some(cause) = cause.downcast_ref::<Error>() {
            let recursion = cause.detail().is_some_and(|d| d.contains("recursion limit"));
            if matches!(cause.kind(), ErrorKind::OutOfFuel | ErrorKind::WriteFailure) || recursion {
                return TemplateError::Exhausted(describe(&error));
            }
        }
        source = cause.source();
    }
    TemplateError::Failed(describe(&error))
}

/// The error and its causes in one line, without template source.
fn describe(error: &Error) -> String {
    let mut text = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if !text.is_empty() {
            text.push_str(": ");
        }
        if write!(text, "{error}").is_err() || text.len() > 1000 {
            break;
        }
        cause = error.source();
    }
    text
}
