//! Query parameters. A parameter that a route does not know is refused, not ignored.

use crate::gateway::error::ApiError;
use axum::extract::rejection::QueryRejection;
use axum::extract::{MatchedPath, Query, Request};
use axum::middleware::Next;
use axum::response::Response;
use http::Method;
use serde_json::{Map, Value};

/// The pairs of a query, in order.
pub type Pairs = Result<Query<Vec<(String, String)>>, QueryRejection>;

/// Parses the query parameters of a route.
///
/// # Errors
/// 400 that names the invalid parameter.
pub fn read<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query.map(|Query(read)| read).map_err(|rejection| refused(&rejection))
}

fn refused(rejection: &QueryRejection) -> ApiError {
    let text = rejection.body_text();
    let why = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
    // serde writes `limit: invalid digit found in string` or "duplicate field `limit`".
    let names =
        |name: &&&str| why.starts_with(&format!("{name}: ")) || why.contains(&format!("`{name}`"));
    match KNOWN.iter().find(names) {
        Some(name) => {
            let why = why.strip_prefix(&format!("{name}: ")).unwrap_or(why);
            ApiError::invalid(*name, format!("The query parameter '{name}' is wrong: {why}."))
        }
        None => ApiError::bad_request(text),
    }
}

/// All parameters of all routes.
const KNOWN: [&str; 7] = ["after", "limit", "order", "purpose", "metadata", "stream", "step"];

/// Parameter that Azure's clients add to every request.
const ALWAYS: &str = "api-version";

/// The query parameters of a route.
fn known(method: &Method, path: &str) -> &'static [&'static str] {
    match (method, path) {
        (&Method::GET, "/v1/files") => &["after", "limit", "order", "purpose"],
        (&Method::GET, "/v1/fine_tuning/jobs") => &["after", "limit", "metadata"],
        (
            &Method::GET,
            "/v1/fine_tuning/jobs/{id}/events"
            | "/v1/fine_tuning/jobs/{id}/checkpoints"
            | "/admin/jobs",
        ) => &["after", "limit"],
        (&Method::GET, "/admin/jobs/{id}/events") => &["stream"],
        (&Method::GET, "/admin/jobs/{id}/rollouts") => &["step", "limit"],
        _ => &[],
    }
}

/// Middleware that refuses parameters which the route does not know.
///
/// # Errors
/// 400 that names the parameter.
pub async fn known_only(
    path: MatchedPath,
    pairs: Pairs,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let pairs = read(pairs)?;
    let known = known(request.method(), path.as_str());
    for (key, _) in &pairs {
        // Clients write an object as `metadata[key]`.
        let name = if key.starts_with("metadata[") { "metadata" } else { key };
        if name != ALWAYS && !known.contains(&name) {
            let key: String = key.chars().take(100).collect();
            let takes = match known {
                [] => "this route takes none".to_owned(),
                known => format!("this route takes {}", known.join(", ")),
            };
            let message = format!("Unknown query parameter: '{key}'; {takes}.");
            return Err(ApiError::invalid(key, message).with_code("unknown_parameter"));
        }
    }
    Ok(next.run(request).await)
}

/// Filter by metadata: one `metadata[key]=value` for each pair that an entry must have, or
/// `metadata=null` for entries without metadata.
#[derive(Debug, PartialEq)]
pub enum MetadataFilter {
    Pairs(Vec<(String, String)>),
    Without,
}

impl MetadataFilter {
    /// Parses the filter from a query.
    ///
    /// # Errors
    /// 400 if the filter has another form.
    pub fn of(pairs: &[(String, String)]) -> Result<Self, ApiError> {
        let (mut wanted, mut without) = (Vec::new(), false);
        for (key, value) in pairs {
            let Some(rest) = key.strip_prefix("metadata") else { continue };
            match rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                Some(key) if !key.is_empty() => wanted.push((key.to_owned(), value.clone())),
                None if rest.is_empty() && value == "null" => without = true,
                _ => {
                    let message =
                        "write metadata[KEY]=VALUE, or metadata=null for jobs without metadata";
                    return Err(ApiError::invalid("metadata", message));
                }
            }
        }
        match (without, wanted.is_empty()) {
            (true, false) => {
                let message = "metadata=null cannot be combined with metadata[KEY]=VALUE";
                Err(ApiError::invalid("metadata", message))
            }
            (true, true) => Ok(Self::Without),
            (false, _) => Ok(Self::Pairs(wanted)),
        }
    }

    /// Whether an entry with this metadata passes the filter.
    pub fn takes(&self, metadata: Option<&Map<String, Value>>) -> bool {
        match self {
            Self::Without => metadata.is_none_or(Map::is_empty),
            Self::Pairs(wanted) => wanted.iter().all(|(key, value)| {
                metadata.and_then(|map| map.get(key)).is_some_and(|found| found == value)
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn filter(pairs: &[(&str, &str)]) -> Result<MetadataFilter, ApiError> {
        let owned = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        MetadataFilter::of(&owned.collect::<Vec<_>>())
    }

    #[test]
    fn metadata_filters() {
        let has = json!({"team": "a", "run": "1"});
        let has = has.as_object();
        for (pairs, with, without) in [
            (&[][..], true, true),
            (&[("limit", "3")], true, true),
            (&[("metadata[team]", "a")], true, false),
            (&[("metadata[team]", "a"), ("metadata[run]", "1")], true, false),
            (&[("metadata[team]", "a"), ("metadata[run]", "2")], false, false),
            (&[("metadata[Team]", "a")], false, false),
            (&[("metadata", "null")], false, true),
        ] {
            let filter = filter(pairs).unwrap();
            assert_eq!((filter.takes(has), filter.takes(None)), (with, without), "{pairs:?}");
        }
        for pairs in [
            &[("metadata", "x")][..],
            &[("metadata[]", "x")],
            &[("metadata[a", "x")],
            &[("metadata", "null"), ("metadata[a]", "x")],
        ] {
            assert_eq!(filter(pairs).unwrap_err().param.as_deref(), Some("metadata"), "{pairs:?}");
        }
    }

    #[test]
    fn errors_name_the_parameter() {
        #[derive(Debug, serde::Deserialize)]
        struct Page {
            limit: Option<u32>,
            after: Option<String>,
        }
        let page = |query: &str| {
            let uri = format!("/v1/files?{query}").parse().unwrap();
            read(Query::<Page>::try_from_uri(&uri))
        };
        let page_2 = page("limit=2&after=a").unwrap();
        assert_eq!((page_2.limit, page_2.after.as_deref()), (Some(2), Some("a")));
        for (query, name) in [
            ("limit=x", "limit"),
            ("limit=-1", "limit"),
            ("limit=", "limit"),
            ("after=a&limit=1.5", "limit"),
            ("after=a&after=b", "after"),
        ] {
            let error = page(query).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{query}: {error:?}");
        }
    }

    #[test]
    fn routes_know_their_parameters() {
        assert_eq!(known(&Method::GET, "/v1/models"), [""; 0]);
        assert!(known(&Method::GET, "/v1/fine_tuning/jobs").contains(&"metadata"));
        assert!(!known(&Method::GET, "/v1/files").contains(&"metadata"));
        assert!(known(&Method::POST, "/v1/files").is_empty());
    }
}
