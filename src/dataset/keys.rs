//! The keys of each format. Any other key is an error: a misspelt key would otherwise be ignored
//! silently, and the model would be trained on less than the file contains.

use serde_json::{Map, Value};

/// Keys with metadata about an example. They are allowed in every line of supervised and preference
/// data, and are not used.
pub(super) const METADATA: &[&str] = &[
    "id",
    "idx",
    "index",
    "uid",
    "uuid",
    "prompt_id",
    "conversation_id",
    "conversation_hash",
    "message_id",
    "question_id",
    "source",
    "source_id",
    "dataset",
    "dataset_name",
    "split",
    "url",
    "date",
    "dump",
    "file_path",
    "license",
    "created",
    "created_at",
    "timestamp",
    "model",
    "model_name",
    "generator",
    "chosen_model",
    "rejected_model",
    "language",
    "language_score",
    "lang",
    "category",
    "subset",
    "task",
    "task_type",
    "topic",
    "tags",
    "labels",
    "difficulty",
    "quality",
    "rating",
    "chosen_rating",
    "rejected_rating",
    "score",
    "score_chosen",
    "score_rejected",
    "chosen_score",
    "rejected_score",
    "turns",
    "num_turns",
    "num_tokens",
    "token_count",
    "metadata",
    "meta",
    "comment",
    "notes",
];

/// The object without keys whose value is null; such keys count as absent.
pub(super) fn without_nulls(object: Map<String, Value>) -> Map<String, Value> {
    object.into_iter().filter(|(_, value)| !value.is_null()).collect()
}

/// Rejects the keys of `object` that are neither in `known` nor in `ignored`, all in one error.
///
/// # Errors
/// The keys, each with the known key that is most similar.
pub(super) fn check_keys(
    object: &Map<String, Value>,
    known: &[&str],
    ignored: &[&str],
) -> Result<(), String> {
    let is_known = |key: &str| known.contains(&key) || ignored.contains(&key);
    let unknown: Vec<&str> =
        object.keys().map(String::as_str).filter(|key| !is_known(key)).collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let named = |key: &&str| match nearest(key, known) {
        Some(meant) => format!("the key `{key}` is unknown: did you mean `{meant}`?"),
        None => format!("the key `{key}` is unknown"),
    };
    let mut message = unknown.iter().take(8).map(named).collect::<Vec<_>>().join("; ");
    if unknown.len() > 8 {
        message += &format!("; and {} more", unknown.len() - 8);
    }
    let advice = match ignored {
        [] => "remove it",
        _ => "remove it, or put it into `metadata`",
    };
    let known: Vec<_> = known.iter().map(|key| format!("`{key}`")).collect();
    let end = if message.ends_with('?') { "" } else { ";" };
    Err(format!("{message}{end} {advice} (known keys: {})", known.join(", ")))
}

/// The known key that `key` is most likely a misspelling of.
pub(super) fn nearest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let plain = |text: &str| -> Vec<char> {
        text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
    };
    let key = plain(key);
    let near = known.iter().map(|&known| (distance(&key, &plain(known)), known));
    let (distance, meant) = near.min_by_key(|(distance, _)| *distance)?;
    (distance <= (key.len() / 3).min(3)).then_some(meant)
}

/// Edit distance from `a` to `b`: insertions, deletions, replacements and swaps of neighbours.
fn distance(a: &[char], b: &[char]) -> usize {
    // Keys are short; a much longer key is similar to none.
    if a.len().abs_diff(b.len()) > 3 {
        return usize::MAX;
    }
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
            if swapped {
                row[j] = row[j].min(rows[i - 2][j - 2] + 1);
            }
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_keys_are_recognised() {
        let known = ["messages", "tools", "history", "reasoning_content"];
        assert_eq!(nearest("mesages", &known), Some("messages"));
        assert_eq!(nearest("Messages", &known), Some("messages"));
        assert_eq!(nearest("histroy", &known), Some("history"));
        assert_eq!(nearest("reasoningContent", &known), Some("reasoning_content"));
        assert_eq!(nearest("toys", &known), None);
        assert_eq!(nearest("mood", &known), None);
        assert_eq!(distance(&['a', 'b'], &['b', 'a']), 1);
    }

    #[test]
    fn all_unknown_keys_are_named_at_once() {
        let object = |text: &str| serde_json::from_str::<Map<_, _>>(text).unwrap();
        let check = |text: &str| check_keys(&object(text), &["text"], METADATA);
        assert_eq!(check(r#"{"text": 1, "id": 2, "metadata": {"any": 3}}"#), Ok(()));
        let error = check(r#"{"txt": 1, "text": 2, "mood": 3}"#).unwrap_err();
        assert!(error.contains("`txt` is unknown: did you mean `text`?"), "{error}");
        assert!(error.contains("`mood` is unknown;"), "{error}");
        assert!(!error.contains("`id`"), "{error}");
    }
}
