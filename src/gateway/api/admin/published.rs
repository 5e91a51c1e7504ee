//! `/admin/published`: names that clients use, and the models that serve them.

use super::{Answer, json_fields, ok, path_name};
use crate::gateway::api::wire::MAX_NAME;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::store::{JobStatus, Published};
use crate::job::JobOrder;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// Shares between these bounds can be told from none and all.
const SHARES: std::ops::RangeInclusive<f32> = 0.0001..=0.9999;

/// `GET /admin/published`.
///
/// # Errors
/// None.
pub async fn list(State(app): State<Arc<App>>) -> Answer {
    let all: Vec<_> = app.registry.published().iter().map(show).collect();
    ok(json!({"object": "list", "data": all}))
}

/// `POST /admin/published`: has `name` stand for `model`, or for a `share` of its requests. With
/// `evaluation`, only if that job evaluated the model and all of its bounds were kept.
///
/// # Errors
/// As [`crate::gateway::registry::Registry::publish`]; 409 if the evaluation does not allow it.
pub async fn publish(State(app): State<Arc<App>>, request: Request) -> Answer {
    let mut fields = json_fields(&app, request).await?;
    let name = fields.string("name", MAX_NAME)?.ok_or_else(|| fields.missing("name"))?;
    let model = fields.string("model", MAX_NAME)?.ok_or_else(|| fields.missing("model"))?;
    let share = fields.number("share", SHARES)?.map(exact);
    let evaluation = fields.string("evaluation", MAX_NAME)?;
    fields.finish()?;
    if let Some(id) = evaluation {
        check_evaluation(&app, &id, &model).await?;
    }
    ok(show(&app.registry.publish(&name, &model, share).await?))
}

/// The decimal number that was written, of which an `f32` keeps six digits.
fn exact(share: f32) -> f64 {
    (f64::from(share) * 1e6).round() / 1e6
}

/// Checks that a job has evaluated the model in the files that it has now, and that every bound was
/// kept, of which there must be one.
async fn check_evaluation(app: &App, id: &str, model: &str) -> Result<(), ApiError> {
    let job = app.jobs.get(id, None).map_err(|error| error.with_param("evaluation"))?;
    let refuse = |why: String| {
        let status = http::StatusCode::CONFLICT;
        Err(ApiError::new(status, "invalid_request_error", why)
            .with_param("evaluation")
            .with_code("evaluation_not_passed"))
    };
    let folder = app.jobs.folder(&job.id);
    let read = tokio::task::spawn_blocking(move || folder.order()).await;
    let order = match read.map_err(ApiError::internal)? {
        Ok(JobOrder::Evaluate(order)) => order,
        Ok(_) => return refuse(format!("The job `{id}` is no evaluation.")),
        Err(error) => {
            return refuse(format!("The folder of the evaluation `{id}` cannot be read: {error}."));
        }
    };
    if !order.spec.has_bounds() {
        return refuse(format!(
            "The evaluation `{id}` has no bound that `{model}` could miss: create one with \
             evaluate.max_kl, evaluate.max_perplexity or evaluate.min_accuracy."
        ));
    }
    let now = app.jobs.eval_model(model, "model").await?;
    let Some(evaluated) = order.models.iter().find(|evaluated| evaluated.name == now.name) else {
        return refuse(format!("The job `{id}` has not evaluated `{model}`."));
    };
    if !evaluated.is_same_file(&now) {
        return refuse(format!(
            "`{model}` has other files now than when the job `{id}` evaluated it: evaluate it again."
        ));
    }
    match job.status {
        JobStatus::Succeeded => Ok(()),
        status => refuse(format!("The evaluation `{id}` of `{model}` is {}.", status.name())),
    }
}

/// `POST /admin/published/{name}/rollback`: the model that served the name before serves it again;
/// a candidate's share ends.
///
/// # Errors
/// As [`crate::gateway::registry::Registry::rollback`].
pub async fn of_name(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let path = path_name(path)?;
    // Names contain slashes, so the route matches all paths below `/admin/published`.
    let Some(name) = path.strip_suffix("/rollback") else {
        let path: String = path.chars().take(200).collect();
        let message = format!("There is no route POST /admin/published/{path}; see /openapi.json.");
        return Err(ApiError::not_found(message));
    };
    ok(show(&app.registry.rollback(name).await?))
}

/// `DELETE /admin/published/{name}`: the name is unknown from now on; its models stay loaded.
///
/// # Errors
/// 404 if the name is not published.
pub async fn remove(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let name = path_name(path)?;
    app.registry.unpublish(&name).await?;
    ok(json!({"id": name, "object": "published", "deleted": true}))
}

fn show(published: &Published) -> Value {
    let candidate = published.candidate.as_ref();
    json!({
        "id": published.name,
        "object": "published",
        "model": published.model,
        "previous": published.previous,
        "candidate": candidate.map(|candidate| &candidate.model),
        "share": candidate.map(|candidate| candidate.share),
        "changed_at": published.changed_at,
    })
}
