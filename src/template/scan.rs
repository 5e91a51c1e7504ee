//! Preparation of a template's source for minijinja: limits, and tags that minijinja lacks.

use std::borrow::Cow;

use super::TemplateError;

/// Maximum size of a template, in bytes. The largest in use have 17 KiB.
pub(super) const MAX_SOURCE: usize = 1 << 20;

/// Maximum number of words and operators in one tag. minijinja's parser bounds nesting, but chains
/// such as `1+1+1…` or `x|f|f…` become equally deep trees, which it then traverses recursively.
const MAX_TAG_ITEMS: usize = 10_000;

/// Maximum number of tags that continue an `if`; a chain of them also makes a deep tree.
const MAX_ELIFS: usize = 5_000;

/// Checks the limits and turns `{% generation %}` blocks into `{% with %}` blocks.
///
/// Generation blocks mark assistant text for training masks. transformers turns them into call
/// blocks, that is, a scope of its own that prints its body: the same as an empty `with`.
///
/// # Errors
/// [`TemplateError::Invalid`] if a limit is exceeded.
pub(super) fn prepare(source: &str) -> Result<String, TemplateError> {
    let invalid = |what: &str| Err(TemplateError::Invalid(what.to_owned()));
    if source.len() > MAX_SOURCE {
        return invalid("the template is larger than 1 MiB");
    }
    // jinja2 reads every line break as "\n" and drops one at the very end (keep_trailing_newline).
    let source: Cow<str> = match source.contains('\r') {
        true => Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n")),
        false => Cow::Borrowed(source),
    };
    let mut out = String::with_capacity(source.len());
    let mut rest: &str = &source;
    let mut elifs = 0;
    while let Some(start) = rest.find('{') {
        let (text, tail) = rest.split_at(start);
        out.push_str(text);
        let end = match tail.as_bytes().get(1) {
            Some(b'#') => tail.find("#}").map_or(tail.len(), |at| at + 2),
            Some(b'{') => tag_end(tail, "}}"),
            Some(b'%') => tag_end(tail, "%}"),
            _ => 1,
        };
        let (tag, after) = tail.split_at(end);
        if !tag.starts_with("{#") && items(tag) > MAX_TAG_ITEMS {
            return invalid("an expression of the template is too long");
        }
        if tag.starts_with("{%") {
            match tag_words(tag).as_slice() {
                ["generation"] => out.push_str(&tag.replacen("generation", "with", 1)),
                ["endgeneration"] => out.push_str(&tag.replacen("endgeneration", "endwith", 1)),
                ["elif", ..] => {
                    elifs += 1;
                    out.push_str(tag);
                }
                _ => out.push_str(tag),
            }
        } else {
            out.push_str(tag);
        }
        rest = after;
    }
    out.push_str(rest);
    if elifs > MAX_ELIFS {
        return invalid("the template has too many branches");
    }
    Ok(out)
}

/// Length of a tag in bytes: up to the end of the first `close` that is not in a string.
fn tag_end(tag: &str, close: &str) -> usize {
    let (bytes, close) = (tag.as_bytes(), close.as_bytes());
    let mut quote = None;
    let mut at = 2;
    while at < bytes.len() {
        match quote {
            Some(_) if bytes[at] == b'\\' => at += 1,
            Some(q) if bytes[at] == q => quote = None,
            Some(_) => {}
            None if bytes[at..].starts_with(close) => return at + close.len(),
            None if matches!(bytes[at], b'"' | b'\'') => quote = Some(bytes[at]),
            None => {}
        }
        at += 1;
    }
    tag.len()
}

/// An upper bound of the operands and operators in a tag.
fn items(tag: &str) -> usize {
    let mut count = 0;
    let mut in_word = false;
    let mut quote = None;
    let mut escaped = false;
    for byte in tag.bytes() {
        if let Some(q) = quote {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                _ if byte == q => quote = None,
                _ => {}
            }
            continue;
        }
        let word = byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80;
        let continues = word && in_word;
        count += usize::from(!byte.is_ascii_whitespace() && !continues);
        in_word = word;
        if matches!(byte, b'"' | b'\'') {
            quote = Some(byte);
        }
    }
    count
}

/// The first words of a `{% … %}` tag, without its whitespace control.
fn tag_words(tag: &str) -> Vec<&str> {
    let inner = tag.strip_prefix("{%").unwrap_or(tag);
    let inner = inner.strip_suffix("%}").unwrap_or(inner);
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.strip_suffix(['-', '+']).unwrap_or(inner);
    inner.split_whitespace().take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_scopes() {
        let source =
            "a{%- generation -%} x {% endgeneration %}{# generation #}{{ '{% generation %}' }}";
        assert_eq!(
            prepare(source).unwrap(),
            "a{%- with -%} x {% endwith %}{# generation #}{{ '{% generation %}' }}"
        );
    }

    #[test]
    fn chains_are_bounded() {
        assert!(prepare(&format!("{{{{ 1{} }}}}", "+1".repeat(20_000))).is_err());
        assert!(
            prepare(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(6000))).is_err()
        );
        assert!(prepare(&"x".repeat(MAX_SOURCE + 1)).is_err());
        assert!(prepare("{{ 'unterminated").is_ok());
    }
}
