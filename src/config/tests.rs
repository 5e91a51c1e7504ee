use super::*;
use clap::Parser;
use std::process::Command;

#[derive(Debug, Parser)]
struct Serve {
    #[command(flatten)]
    options: ServeOptions,
}

fn parse(arguments: &[&str]) -> ServeOptions {
    let arguments = std::iter::once("ingot").chain(arguments.iter().copied());
    Serve::try_parse_from(arguments).expect("flags parse").options
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

fn resolve_with(text: &str, arguments: &[&str]) -> Result<ServeConfig, ConfigError> {
    let file = file(text);
    let mut options = parse(arguments);
    options.config = Some(file.path().to_owned());
    options.resolve()
}

#[test]
fn defaults_are_the_documented_ones() {
    let config = parse(&[]).resolve().unwrap();
    assert_eq!(config.listen.address.to_string(), "127.0.0.1:8000");
    assert_eq!(config.limits.body_limit, 16 << 20);
    assert_eq!(config.limits.request_timeout, Duration::from_secs(600));
    assert_eq!(config.engine.max_sequences, None);
    assert_eq!(config.engine.context_length, None);
    assert!(config.engine.threads >= 1);
    assert!(config.engine.flash_attention.is_none());
    assert!(config.engine.mmap && !config.log.prompts);
    assert!(config.models.is_empty() && config.keys.rate_limit.is_none());
}

#[test]
fn remote_models_have_an_address_and_a_key() {
    let text = "remote_model = ['judge=https://h/v1#big', 'small=http://127.0.0.1:9/v1']\n\
                remote_key = ['judge=sesame']";
    let models = resolve_with(text, &[]).unwrap().jobs.remote_models;
    let model = |name: &str, url: &str, model: &str, key: Option<&str>| RemoteModel {
        name: name.into(),
        url: url.into(),
        model: model.into(),
        key: key.map(|key| key.parse().unwrap()),
    };
    let judge = model("judge", "https://h/v1", "big", Some("sesame"));
    assert_eq!(models, [judge, model("small", "http://127.0.0.1:9/v1", "small", None)]);
    for bad in ["judge", "judge=", "=https://h/v1", "judge=ftp://h/v1", "judge=https://h/v1#"] {
        assert!(bad.parse::<RemoteModelArg>().unwrap_err().contains("NAME=https://"), "{bad}");
    }
    let nameless = resolve_with("remote_key = ['sesame']", &[]).unwrap_err().to_string();
    assert!(nameless.contains("NAME=KEY") && !nameless.contains("sesame"), "{nameless}");
    assert!(!format!("{:?}", "a=sesame".parse::<RemoteKeyArg>()).contains("sesame"));
    let twice = "remote_model = ['a=http://h/v1', 'a=http://i/v1']";
    assert!(resolve_with(twice, &[]).unwrap_err().to_string().contains("twice"));
    let unknown = resolve_with("remote_key = ['a=b']", &[]).unwrap_err().to_string();
    assert!(unknown.contains("`a`") && !unknown.contains("`b`"), "{unknown}");
}

#[test]
fn flag_beats_file_beats_default() {
    let text = "port = 7001\nmax_sequences = 8\nwatchdog = '2500ms'\nbody_timeout = 7\n\
                memory_budget = '4GiB'\nkv_type = 'q8_0'\njob_memory_reserve = '1GiB'\nrunner = 'mock'";
    let config = resolve_with(text, &["--port", "7002", "--mmap", "off"]).unwrap();
    assert_eq!(config.listen.address.port(), 7002);
    assert_eq!(config.engine.max_sequences, Some(8));
    assert_eq!(config.engine.watchdog, Duration::from_millis(2500));
    assert_eq!(config.listen.body_timeout, Duration::from_secs(7));
    assert_eq!(config.engine.memory_budget, Some(4 << 30));
    assert_eq!(config.jobs.memory_reserve, 1 << 30);
    assert_eq!(config.engine.kv_type, KvCacheType::Q8_0);
    assert_eq!(config.engine.runner, Some(RunnerKind::Mock));
    assert_eq!(config.engine.queue_limit, 256);
    assert!(!config.engine.mmap);
}

/// Setting a variable of the own process is unsafe, so the test runs itself again as a child.
#[test]
fn environment_lies_between_flag_and_file() {
    if std::env::var_os("INGOT_TEST_CHILD").is_some() {
        let config =
            resolve_with("port = 7001\nqueue_limit = 3", &["--max-sequences", "9"]).unwrap();
        assert_eq!(config.listen.address.port(), 7003);
        assert_eq!(config.engine.max_sequences, Some(9));
        assert_eq!(config.engine.queue_limit, 3);
        assert_eq!(config.keys.api_keys.len(), 2);
        assert_eq!(config.hub.token, Some("hub".parse().unwrap()));
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "config::tests::environment_lies_between_flag_and_file"])
        .env("INGOT_TEST_CHILD", "1")
        .env("INGOT_PORT", "7003")
        .env("INGOT_MAX_SEQUENCES", "4")
        .env("INGOT_API_KEY", "one,two")
        .env("HF_TOKEN", "hub")
        .output()
        .unwrap();
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stdout));
}

#[test]
fn unknown_keys_are_named() {
    let error = resolve_with("prot = 1", &[]).unwrap_err().to_string();
    assert!(error.contains("prot") && error.contains("not valid"), "{error}");
    let error = resolve_with("body_limit = 'many'", &[]).unwrap_err().to_string();
    assert!(error.contains("not a size"), "{error}");
}

#[test]
fn paths_in_a_file_are_relative_to_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("keys"), "# ours\nabc\n\n def \n").unwrap();
    std::fs::write(folder.path().join("c.toml"), "api_key_file = 'keys'\nadapter = ['a=b/c']")
        .unwrap();
    let mut options = parse(&[]);
    options.config = Some(folder.path().join("c.toml"));
    let config = options.resolve().unwrap();
    let keys: Vec<_> = config.keys.api_keys.iter().map(Secret::expose).collect();
    assert_eq!(keys, ["abc", "def"]);
    assert_eq!(config.adapters[0].path, folder.path().join("b/c"));
}

#[test]
fn a_public_address_needs_keys() {
    let error = parse(&["--host", "0.0.0.0"]).resolve().unwrap_err();
    assert!(matches!(error, ConfigError::PublicWithoutKeys(_)));
    assert!(error.to_string().contains("--api-key"), "{error}");
    parse(&["--host", "0.0.0.0", "--api-key", "k"]).resolve().unwrap();
    parse(&["--host", "::1"]).resolve().unwrap();
    let error = parse(&["--host", "example"]).resolve().unwrap_err().to_string();
    assert!(error.starts_with("--host takes an IP address"), "{error}");
}

#[test]
fn impossible_values_are_refused_by_name() {
    let refused = |arguments: &[&str]| parse(arguments).resolve().unwrap_err().to_string();
    assert!(refused(&["--max-sequences", "300"]).contains("--max-sequences is 300"));
    assert!(refused(&["--batch-tokens", "8"]).contains("--batch-tokens"));
    assert!(refused(&["--watchdog", "0"]).contains("--watchdog"));
    assert!(refused(&["--body-limit", "1"]).contains("--body-limit"));
    assert!(refused(&["--api-key", "k", "--admin-key", "k"]).contains("--admin-key"));
    assert!(refused(&["--adapter", "a=b", "--adapter", "a=c"]).contains("--adapter"));
    for bad in [["--port", "x"], ["--threads", "0"], ["--adapter", "x"], ["--grace-time", "1y"]] {
        let error = Serve::try_parse_from(["ingot"].iter().chain(&bad)).unwrap_err().to_string();
        assert!(error.contains(bad[0]), "{error}");
    }
}

#[test]
fn secrets_are_not_printed() {
    let config = parse(&["--api-key", "hunter2", "--admin-key", "hunter3"]).resolve().unwrap();
    let printed = format!("{config:?} {:?}", parse(&["--api-key", "hunter4"]));
    assert!(!printed.contains("hunter"), "{printed}");
}

#[test]
fn host_headers() {
    let local = AllowedHosts::new("127.0.0.1".parse().unwrap(), &["Models.Example:8000".into()]);
    for good in ["localhost:8000", "LOCALHOST", "127.0.0.1:1", "[::1]:8000", "models.example"] {
        assert!(local.allows(good), "{good}");
    }
    for bad in ["evil.example", "", "127.0.0.2", "localhost.evil.example:8000", "[::2]"] {
        assert!(!local.allows(bad), "{bad}");
    }
    let everywhere = AllowedHosts::new("0.0.0.0".parse().unwrap(), &[]);
    assert!(everywhere.allows("192.0.2.7:8000") && !everywhere.allows("evil.example"));
    let any = AllowedHosts::new("127.0.0.1".parse().unwrap(), &["*".into()]);
    assert!(any.allows("whatever"));
}

#[test]
fn sizes_and_times() {
    assert_eq!("4GiB".parse(), Ok(ByteSize(4 << 30)));
    assert_eq!("1.5 KiB".parse(), Ok(ByteSize(1536)));
    assert_eq!("10".parse(), Ok(ByteSize(10)));
    assert_eq!("2GB".parse(), Ok(ByteSize(2_000_000_000)));
    assert!("-1".parse::<ByteSize>().is_err() && "x".parse::<ByteSize>().is_err());
    assert_eq!("250ms".parse(), Ok(Span(Duration::from_millis(250))));
    assert_eq!("2m".parse(), Ok(Span(Duration::from_secs(120))));
    assert!("1e9s".parse::<Span>().is_err() && "".parse::<Span>().is_err());
    assert_eq!(ByteSize(98_362_432).to_string(), "93.8 MiB");
}

const DEFAULT_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/configs/default.toml");

#[test]
fn the_default_file_documents_every_option_and_changes_nothing() {
    let text = std::fs::read_to_string(DEFAULT_FILE).unwrap();
    let mut options = parse(&[]);
    options.config = Some(DEFAULT_FILE.into());
    assert_eq!(options.resolve().unwrap(), parse(&[]).resolve().unwrap());

    // With every commented-out key switched on, the file still parses, and names every option.
    let all: String = text
        .lines()
        .map(|line| line.strip_prefix("#: ").unwrap_or(line).to_owned() + "\n")
        .collect();
    toml::from_str::<ServeOptions>(&all).unwrap();
    let table: toml::Table = toml::from_str(&all).unwrap();
    for argument in <Serve as clap::CommandFactory>::command().get_arguments() {
        let key = argument.get_id().as_str();
        if !argument.is_hide_set() && !["config", "help"].contains(&key) {
            assert!(table.contains_key(key), "configs/default.toml does not document `{key}`");
        }
        if key != "help" {
            let variable = argument.get_env().and_then(|name| name.to_str());
            assert_eq!(variable, Some(format!("INGOT_{}", key.to_uppercase()).as_str()));
        }
    }
}
