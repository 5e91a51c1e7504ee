//! Tests without an engine; the rest is tested through the whole server in `tests/`.

use super::*;
use crate::config::ServeOptions;

pub(super) fn registry() -> (Arc<Registry>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let options =
        ServeOptions { data_dir: Some(folder.path().to_owned()), ..ServeOptions::default() };
    let store = Arc::new(Store::open(folder.path()).unwrap());
    (Registry::new(Arc::new(options.resolve().unwrap()), store), folder)
}

#[tokio::test]
async fn unknown_names_are_404_everywhere() {
    let (registry, _folder) = registry();
    let missing = registry.resolve("nobody").unwrap_err();
    assert_eq!((missing.status.as_u16(), missing.code.as_deref()), (404, Some("model_not_found")));
    assert_eq!(registry.card("nobody").unwrap_err().status, 404);
    assert_eq!(registry.load_model("nobody", None).await.unwrap_err().status, 404);
    assert_eq!(registry.unload_model("nobody").await.unwrap_err().status, 404);
    assert_eq!(registry.unload_adapter("nobody").unwrap_err().status, 404);
    assert!(registry.list().is_empty() && registry.not_ready().is_empty());
}

#[tokio::test]
async fn files_that_are_no_models_are_422_and_free_their_name() {
    let (registry, folder) = registry();
    let path = folder.path().join("bad.gguf");
    std::fs::write(&path, b"this is not a model").unwrap();
    for _ in 0..2 {
        let error = registry.load_path("bad", path.clone(), None).await.unwrap_err();
        assert_eq!(error.status, 422, "{error}");
        assert!(!error.message.contains(folder.path().to_str().unwrap()), "{error}");
    }
    assert!(registry.loading().is_empty());
}

#[tokio::test]
async fn clients_name_adapters_by_id_and_never_by_path() {
    let (registry, folder) = registry();
    let adapters = folder.path().join("adapters");
    std::fs::write(adapters.join("a.gguf"), b"x").unwrap();
    std::fs::write(folder.path().join("secret.gguf"), b"x").unwrap();
    std::os::unix::fs::symlink(folder.path().join("secret.gguf"), adapters.join("link")).unwrap();
    assert!(registry.adapter_path("a.gguf").await.unwrap().ends_with("adapters/a.gguf"));
    for (id, status) in [
        ("../secret.gguf", 400),
        ("/etc/passwd", 400),
        ("..", 400),
        (".", 400),
        ("", 400),
        ("a\0b", 400),
        ("link", 404),
        ("nobody", 404),
    ] {
        assert_eq!(registry.adapter_path(id).await.unwrap_err().status, status, "{id:?}");
    }
}

/// Jobs take the GGUF of an upload, which is in a folder of its own.
#[test]
fn an_adapter_is_a_peft_folder_a_file_or_the_only_gguf_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let of = |name: &str| folder.path().join(name);
    for name in ["peft", "upload", "two", "none"] {
        std::fs::create_dir(of(name)).unwrap();
    }
    for file in
        ["peft/adapter_config.json", "peft/x.gguf", "upload/a.gguf", "two/a.gguf", "two/b.gguf"]
    {
        std::fs::write(of(file), b"x").unwrap();
    }
    for (source, file) in
        [("peft", "peft"), ("upload", "upload/a.gguf"), ("upload/a.gguf", "upload/a.gguf")]
    {
        assert_eq!(adapters::adapter_file(&of(source)).unwrap(), of(file));
    }
    for source in ["two", "none"] {
        assert_eq!(adapters::adapter_file(&of(source)).unwrap_err().status, 422, "{source}");
    }
}

#[tokio::test]
async fn an_adapter_needs_a_base() {
    let (registry, folder) = registry();
    let spec = |base: Option<&str>| AdapterSpec {
        name: "a".into(),
        base: base.map(str::to_owned),
        path: folder.path().to_owned(),
        scale: 1.0,
        check: false,
    };
    assert_eq!(registry.load_adapter(spec(None)).await.unwrap_err().status, 400);
    assert_eq!(registry.load_adapter(spec(Some("m"))).await.unwrap_err().status, 404);
    let nan = AdapterSpec { scale: f32::NAN, ..spec(None) };
    assert_eq!(registry.load_adapter(nan).await.unwrap_err().param.as_deref(), Some("scale"));
}

#[test]
fn work_folders_of_the_dead_are_swept() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let run = folder.path().join("run");
    // Process ids are below 2^22 on Linux.
    for name in ["99999999", "1", "notes"] {
        std::fs::create_dir_all(run.join(name)).unwrap();
    }
    adapters::sweep_work_folders(&store);
    assert!(!run.join("99999999").exists());
    assert!(run.join("1").exists() && run.join("notes").exists());
}
