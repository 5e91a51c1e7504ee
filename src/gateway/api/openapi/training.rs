//! Files, fine-tuning and jobs, in the document.

use super::{content, operation, path_parameter, reference};
use crate::gateway::store::JobStatus;
use serde_json::{Value, json};

fn page(mut described: Value) -> Value {
    described["parameters"] = json!([
        {"name": "after", "in": "query", "schema": {"type": "string"}},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1}},
    ]);
    described
}

fn bytes() -> Value {
    json!({"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}})
}

pub(super) fn file_paths(keys: bool, add: &mut impl FnMut(&str, Value)) {
    let file = |id: &str, summary: &str| operation(id, "files", keys).summary(summary);
    let one = || content(&reference("File"));
    let mut upload = file("createFile", "Keeps a file: JSONL to train on, at most 512 MiB.")
        .answers("200", one())
        .fails(&["400", "507"]);
    upload.0["requestBody"] = json!({"required": true, "content": {
        "multipart/form-data": {"schema": reference("CreateFileRequest")},
    }});
    add(
        "/v1/files",
        json!({
            "get": page(file("listFiles", "Files of this key, the newest first.")
                .answers("200", content(&reference("List"))).fails(&["400"]).0),
            "post": upload.0,
        }),
    );
    add(
        "/v1/files/{id}",
        json!({
            "parameters": [path_parameter("id")],
            "get": file("retrieveFile", "What is known of a file.")
                .answers("200", one()).fails(&["404"]).0,
            "delete": file("deleteFile", "Deletes a file; jobs that use it keep it.")
                .answers("200", content(&json!({"type": "object"}))).fails(&["404"]).0,
        }),
    );
    add(
        "/v1/files/{id}/content",
        json!({
            "parameters": [path_parameter("id")],
            "get": file("downloadFile", "The bytes of a file.")
                .answers("200", bytes()).fails(&["404"]).0,
        }),
    );
}

pub(super) fn fine_tuning_paths(keys: bool, add: &mut impl FnMut(&str, Value)) {
    let tuning = |id: &str, summary: &str| operation(id, "fine-tuning", keys).summary(summary);
    let one = || content(&reference("FineTuningJob"));
    let list = || content(&reference("List"));
    add(
        "/v1/fine_tuning/jobs",
        json!({
            "get": page(tuning("listFineTuningJobs", "Jobs of this key, the newest first.")
                .answers("200", list()).fails(&["400"]).0),
            "post": tuning("createFineTuningJob", "Trains an adapter of a served model.")
                .body("CreateFineTuningJobRequest")
                .answers("200", one())
                .fails(&["400", "404", "422", "507"]).0,
        }),
    );
    add(
        "/v1/fine_tuning/jobs/{id}",
        json!({
            "parameters": [path_parameter("id")],
            "get": tuning("retrieveFineTuningJob", "One of them.")
                .answers("200", one()).fails(&["404"]).0,
        }),
    );
    for (verb, id, summary, request) in [
        ("validate", "validateGrader", "A grader with its defaults.", "ValidateGraderRequest"),
        ("run", "runGrader", "What a grader makes of one answer.", "RunGraderRequest"),
    ] {
        add(
            &format!("/v1/fine_tuning/alpha/graders/{verb}"),
            json!({"post": tuning(id, summary)
                .body(request)
                .answers("200", content(&json!({"type": "object"})))
                .fails(&["400"]).0}),
        );
    }
    for (verb, id, summary) in [
        ("cancel", "cancelFineTuningJob", "Ends a job; nothing is published."),
        ("pause", "pauseFineTuningJob", "Has a job write a checkpoint and leave."),
        ("resume", "resumeFineTuningJob", "Queues a paused job again."),
    ] {
        add(
            &format!("/v1/fine_tuning/jobs/{{id}}/{verb}"),
            json!({
                "parameters": [path_parameter("id")],
                "post": tuning(id, summary).answers("200", one()).fails(&["400", "404"]).0,
            }),
        );
    }
    for (what, id, summary) in [
        ("events", "listFineTuningEvents", "What a job said, the newest first."),
        ("checkpoints", "listFineTuningJobCheckpoints", "Checkpoints that can be called."),
    ] {
        add(
            &format!("/v1/fine_tuning/jobs/{{id}}/{what}"),
            json!({
                "parameters": [path_parameter("id")],
                "get": page(tuning(id, summary).answers("200", list()).fails(&["400", "404"]).0),
            }),
        );
    }
}

pub(super) fn job_paths(add: &mut impl FnMut(&str, Value)) {
    let admin = |id: &str, summary: &str| operation(id, "admin", false).admin().summary(summary);
    let one = || content(&reference("Job"));
    let list = || content(&reference("List"));
    let id = || json!([path_parameter("id")]);
    add(
        "/admin/jobs",
        json!({
            "get": page(admin("adminListJobs", "All jobs, the newest first.")
                .answers("200", list()).fails(&["400"]).0),
            "post": admin("adminCreateJob", "Takes a job of any kind.")
                .body("JobSpec").answers("201", one()).fails(&["400", "404", "422", "507"]).0,
        }),
    );
    add(
        "/admin/jobs/{id}",
        json!({
            "parameters": id(),
            "get": admin("adminRetrieveJob", "One of them.")
                .answers("200", one()).fails(&["404"]).0,
        }),
    );
    for (verb, name, summary) in [
        ("cancel", "adminCancelJob", "Ends a job; nothing is published."),
        ("pause", "adminPauseJob", "Has a job write a checkpoint and leave."),
        ("resume", "adminResumeJob", "Queues a paused job again."),
    ] {
        add(
            &format!("/admin/jobs/{{id}}/{verb}"),
            json!({
                "parameters": id(),
                "post": admin(name, summary).answers("200", one()).fails(&["400", "404"]).0,
            }),
        );
    }
    let mut events = admin("adminFollowJob", "Events as they happen, until the job has ended.")
        .answers(
            "200",
            json!({
                "text/event-stream": {"schema": {"type": "string"}},
                "application/json": {"schema": reference("List")},
            }),
        )
        .fails(&["400", "404"]);
    events.0["parameters"] = json!([{
        "name": "stream", "in": "query", "schema": {"type": "boolean", "default": true},
    }]);
    add("/admin/jobs/{id}/events", json!({"parameters": id(), "get": events.0}));
    add(
        "/admin/jobs/{id}/plot.svg",
        json!({
            "parameters": id(),
            "get": admin("adminPlotJob", "Losses and learning rate by step.")
                .answers("200", json!({"image/svg+xml": {"schema": {"type": "string"}}}))
                .fails(&["404"]).0,
        }),
    );
    add(
        "/admin/jobs/{id}/artifacts",
        json!({
            "parameters": id(),
            "get": admin("adminListArtifacts", "What a job made.")
                .answers("200", list()).fails(&["404"]).0,
        }),
    );
    add(
        "/admin/jobs/{id}/artifacts/{artifact}",
        json!({
            "parameters": [path_parameter("id"), path_parameter("artifact")],
            "get": admin("adminDownloadArtifact", "Its bytes.")
                .answers("200", bytes()).fails(&["404"]).0,
        }),
    );
}

/// Schemas by name.
pub(super) fn schemas() -> Value {
    let text = || json!({"type": "string"});
    let maybe = |kind: &str| json!({"type": [kind, "null"]});
    let number = || json!({"type": "integer"});
    let auto = |kind: &str| json!({"oneOf": [{"const": "auto"}, {"type": kind}]});
    let statuses: Vec<_> = JobStatus::ALL.iter().map(|status| status.name()).collect();
    json!({
        "List": {"type": "object", "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"type": "object"}},
            "first_id": maybe("string"), "last_id": maybe("string"),
            "has_more": {"type": "boolean"},
        }},
        "File": {"type": "object", "properties": {
            "id": text(), "object": {"const": "file"}, "bytes": number(), "created_at": number(),
            "filename": text(), "purpose": text(), "status": text(),
        }},
        "CreateFileRequest": {"type": "object", "required": ["file", "purpose"], "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": ["fine-tune", "batch"]},
        }},
        "Hyperparameters": {"type": "object", "properties": {
            "n_epochs": auto("integer"), "batch_size": auto("integer"),
            "learning_rate_multiplier": auto("number"),
        }},
        "CreateFineTuningJobRequest": {
            "type": "object", "required": ["model", "training_file"], "properties": {
                "model": text(), "training_file": text(), "validation_file": maybe("string"),
                "suffix": {"type": ["string", "null"], "maxLength": 64},
                "seed": maybe("integer"), "metadata": {"type": ["object", "null"]},
                "method": {"type": "object", "properties": {
                    "type": {"const": "supervised"},
                    "supervised": {"type": "object", "properties": {
                        "hyperparameters": reference("Hyperparameters"),
                    }},
                }},
                "hyperparameters": reference("Hyperparameters"),
            },
        },
        "FineTuningJob": {"type": "object", "properties": {
            "id": text(), "object": {"const": "fine_tuning.job"}, "created_at": number(),
            "finished_at": maybe("integer"), "estimated_finish": maybe("integer"),
            "model": text(), "fine_tuned_model": maybe("string"),
            "status": {"enum": [
                "validating_files", "queued", "running", "succeeded", "failed", "cancelled",
            ]},
            "hyperparameters": reference("Hyperparameters"), "training_file": text(),
            "validation_file": maybe("string"),
            "result_files": {"type": "array", "items": text()},
            "trained_tokens": maybe("integer"), "seed": number(),
            "error": {"type": ["object", "null"]}, "metadata": {"type": "object"},
        }},
        "Grader": {"type": "object", "required": ["type"], "properties": {"type": {"enum": [
            "string_check", "text_similarity", "score_model", "multi", "number_match",
            "json_schema", "length", "regex", "reward_model",
        ]}}},
        "ValidateGraderRequest": {"type": "object", "required": ["grader"], "properties": {
            "grader": reference("Grader"),
        }},
        "RunGraderRequest": {
            "type": "object", "required": ["grader", "model_sample"],
            "properties": {
                "grader": reference("Grader"), "model_sample": text(), "item": {"type": "object"},
            },
        },
        "JobSpec": {"type": "object", "required": ["kind", "data"], "properties": {
            "kind": {"enum": ["sft", "pretrain", "dpo", "reward", "grpo"]}, "model": text(), "name": text(),
            "suffix": text(), "seed": number(),
            "data": {"type": "object", "required": ["train"], "properties": {
                "train": text(), "validation": text(), "shuffle": {"type": "boolean"},
            }},
            "adapter": {"type": ["object", "null"]}, "pretrain": {"type": "object"},
            "train": {"type": "object"}, "export": {"type": "object"},
        }},
        "Job": {"type": "object", "properties": {
            "id": text(), "object": {"const": "job"}, "kind": text(),
            "status": {"enum": statuses}, "name": text(), "created_at": number(),
            "started_at": maybe("integer"), "finished_at": maybe("integer"),
            "progress": {"type": "object"},
            "artifacts": {"type": "array", "items": {"type": "object"}},
            "error": {"type": ["object", "null"]}, "spec": reference("JobSpec"),
        }},
    })
}
