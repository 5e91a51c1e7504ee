use super::admit::fits;
use crate::gateway::store::{
    Candidate, Finished, JobStatus, Products, Published, Store, StoredAdapter, StoredArtifact,
    StoredFile, StoredJob,
};
use crate::job::ResourceEstimate;

fn store() -> (Store, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    (Store::open(folder.path()).unwrap(), folder)
}

fn job(id: &str, owner: &str) -> StoredJob {
    StoredJob {
        id: id.into(),
        kind: "sft".into(),
        status: JobStatus::Validating,
        spec: "{}".into(),
        request: None,
        name: format!("ft:m:ingot::{id}"),
        owner: owner.into(),
        created_at: 1,
        started_at: None,
        finished_at: None,
        error: None,
        trained_tokens: None,
    }
}

fn products(id: &str) -> Products {
    let (sha256, bytes) = (String::new(), 1);
    let artifact = StoredArtifact {
        id: format!("artifact-{id}"),
        kind: "adapter".into(),
        file: "artifacts/adapter.gguf".into(),
        bytes,
        sha256: sha256.clone(),
    };
    let result = StoredFile {
        id: format!("file-{id}"),
        name: "step_metrics.csv".into(),
        purpose: "fine-tune-results".into(),
        bytes,
        sha256: sha256.clone(),
        owner: "a".into(),
        created_at: 5,
    };
    let adapter = StoredAdapter {
        name: format!("ft:m:ingot::{id}"),
        base_model: "m".into(),
        file: "jobs/x/artifacts/adapter.gguf".into(),
        format: "gguf".into(),
        sha256,
        bytes,
        scale: 0.5,
        created_at: 5,
    };
    let (artifacts, results, adapter) = (vec![artifact], vec![result], Some(adapter));
    Products { trained_tokens: 9, artifacts, results, adapter, model: None }
}

#[test]
fn a_status_changes_once() {
    use JobStatus::{Cancelled, Failed, Paused, Queued, Running, Validating};
    let (store, _folder) = store();
    store.put_job(&job("1", "a")).unwrap();
    let go = |from: &[JobStatus], to, now| store.move_job("1", from, to, None, now).unwrap();
    assert!(!go(&[Queued], Running, 2));
    assert!(go(&[Validating], Queued, 2));
    assert!(go(&[Queued], Running, 3) && !go(&[Queued], Running, 4));
    assert!(go(&[Running], Paused, 4) && go(&[Paused], Queued, 5) && go(&[Queued], Running, 6));
    let found = store.job("1").unwrap().unwrap();
    assert_eq!((found.status, found.started_at, found.finished_at), (Running, Some(3), None));
    assert!(go(&[Running, Paused], Cancelled, 7));
    assert_eq!(store.job("1").unwrap().unwrap().finished_at, Some(7));
    let finished = store.finish_job("1", &products("1"), 8).unwrap();
    assert_eq!(finished, Finished::OtherStatus, "it was cancelled");
    assert!(store.artifacts("1").unwrap().is_empty() && store.adapters().unwrap().is_empty());
    store.put_job(&job("2", "b")).unwrap();
    let why = Some("{\"code\": \"x\"}");
    assert!(store.move_job("2", &[Validating], Failed, why, 9).unwrap());
    assert_eq!(store.job("2").unwrap().unwrap().error.as_deref(), why);
    let counts = store.job_counts().unwrap();
    assert!(counts.contains(&("failed", 1)) && counts.contains(&("running", 0)), "{counts:?}");
}

#[test]
fn what_a_job_made_comes_with_its_status() {
    use JobStatus::{Queued, Running, Validating};
    let (store, _folder) = store();
    for id in ["1", "2"] {
        store.put_job(&job(id, id)).unwrap();
        store.move_job(id, &[Validating], Queued, None, 2).unwrap();
    }
    let queued: Vec<_> = store.jobs_in(Queued).unwrap().into_iter().map(|job| job.id).collect();
    assert_eq!(queued, ["1", "2"], "the oldest first");
    store.move_job("1", &[Queued], Running, None, 2).unwrap();
    assert_eq!(store.finish_job("1", &products("1"), 3).unwrap(), Finished::Done);
    let found = store.job("1").unwrap().unwrap();
    assert_eq!((found.status, found.trained_tokens), (JobStatus::Succeeded, Some(9)));
    assert_eq!(store.artifacts("1").unwrap(), products("1").artifacts);
    assert_eq!(store.adapter("ft:m:ingot::1").unwrap(), products("1").adapter);
    assert_eq!(store.file("file-1").unwrap().as_ref(), products("1").results.first());
    assert_eq!(store.files(Some("a")).unwrap().len(), 1);
    assert!(store.files(Some("b")).unwrap().is_empty());
    assert_eq!(store.jobs(Some("1")).unwrap().len(), 1);
    assert_eq!(store.jobs(None).unwrap().len(), 2);
}

#[test]
fn the_name_of_another_model_is_not_taken_over() {
    use JobStatus::{Queued, Running, Validating};
    let (store, _folder) = store();
    for id in ["1", "2"] {
        store.put_job(&StoredJob { name: "new".into(), ..job(id, "a") }).unwrap();
        store.move_job(id, &[Validating], Queued, None, 2).unwrap();
        store.move_job(id, &[Queued], Running, None, 2).unwrap();
    }
    let makes = |id: &str| {
        let file = format!("jobs/{id}/artifacts/adapter.gguf").into();
        let adapter = StoredAdapter { name: "new".into(), file, ..products(id).adapter.unwrap() };
        Products { adapter: Some(adapter), ..products(id) }
    };
    assert_eq!(store.job_making("new").unwrap().unwrap().id, "1");
    assert!(store.job_making("new:ckpt-step-5").unwrap().is_some());
    assert!(store.job_making("newer").unwrap().is_none());
    assert_eq!(store.finish_job("1", &makes("1"), 3).unwrap(), Finished::Done);
    assert!(!store.name_is_taken("new", "1").unwrap(), "the job itself made it");
    assert!(store.name_is_taken("new", "2").unwrap());
    assert_eq!(store.finish_job("2", &makes("2"), 4).unwrap(), Finished::NameTaken);
    assert_eq!(store.job("2").unwrap().unwrap().status, Running);
    assert_eq!(store.adapter("new").unwrap(), makes("1").adapter);
    let evaluation = StoredJob { kind: "evaluate".into(), name: "other".into(), ..job("3", "a") };
    store.put_job(&evaluation).unwrap();
    assert!(!evaluation.makes_model() && store.job_making("other").unwrap().is_none());
    let candidate = Some(Candidate { model: "b".into(), share: 0.5 });
    let (name, model, previous) = ("other".into(), "a".into(), None);
    let published = Published { name, model, previous, candidate, changed_at: 1 };
    store.put_published(&published).unwrap();
    assert!(store.name_is_taken("other", "3").unwrap());
}

#[test]
fn a_published_checkpoint_keeps_its_file() {
    let (store, folder) = store();
    let file = std::path::PathBuf::from("jobs/1/checkpoints/adapter-5.gguf");
    std::fs::create_dir_all(folder.path().join("jobs/1/checkpoints")).unwrap();
    std::fs::write(folder.path().join(&file), b"weights").unwrap();
    let name = "new:ckpt-step-5";
    let checkpoint = StoredAdapter { name: name.into(), file, ..products("1").adapter.unwrap() };
    store.put_adapter(&checkpoint).unwrap();
    store.put_adapter(&products("1").adapter.unwrap()).unwrap();
    store.keep_checkpoint(name).unwrap().unwrap();
    std::fs::remove_file(folder.path().join(&checkpoint.file)).unwrap();
    let kept = store.adapter(name).unwrap().unwrap();
    assert!(kept.is_kept_checkpoint() && !checkpoint.is_kept_checkpoint());
    let file = folder.path().join(&kept.file);
    assert_eq!(std::fs::read(&file).unwrap(), b"weights");
    // Twice is once, and other adapters stay where they are.
    for name in [name, "ft:m:ingot::1", "unknown"] {
        store.keep_checkpoint(name).unwrap().unwrap();
    }
    assert_eq!(store.adapter(name).unwrap(), Some(kept));
    assert_eq!(store.adapter("ft:m:ingot::1").unwrap(), products("1").adapter);
    assert!(store.forget_adapter(name).unwrap() && !file.exists());
    assert!(!store.forget_adapter(name).unwrap());
}

#[test]
fn what_does_not_fit_the_machine_is_refused_with_the_numbers() {
    const GIB: u64 = 1 << 30;
    let needs = ResourceEstimate { memory: 3 * GIB, disk: 2 * GIB, trained: 1234 };
    assert!(fits(&needs, 3 * GIB, 2 * GIB).is_ok());
    let refused = |memory, disk| {
        let error = fits(&needs, memory, disk).unwrap_err();
        (error.status.as_u16(), error.code.clone().unwrap_or_default(), error.message)
    };
    let (status, code, message) = refused(2 * GIB, 2 * GIB);
    assert_eq!((status, &code[..]), (422, "insufficient_memory"));
    assert!(message.contains("3.00 GiB") && message.contains("2.00 GiB"), "{message}");
    assert!(message.contains("1234"), "{message}");
    let (status, code, message) = refused(3 * GIB, GIB);
    assert_eq!((status, &code[..]), (507, "disk_full"));
    assert!(message.contains("2.00 GiB") && message.contains("1.00 GiB"), "{message}");
}
