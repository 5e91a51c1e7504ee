//! The structure of the source: imports between modules, `unsafe` only where allowed, length of
//! files.
//!
//! A module may only import modules below it. The tables list modules from top to bottom, each with
//! the modules that it may import, all of which are below it. A new import between modules needs an
//! entry in its table. Tests inside `src` are exempt.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Modules from top to bottom, and the modules that each may import.
type Table = &'static [(&'static str, &'static [&'static str])];

/// Modules of the crate. Gateway and engine share only `ipc`.
const ROOMS: Table = &[
    (
        "main",
        &["cli", "train", "compress", "evaluate", "engine", "gateway", "job", "config", "isa"],
    ),
    ("cli", &["gateway", "config", "job", "dataset", "grade", "gguf", "ipc", "build_info", "isa"]),
    (
        "gateway",
        &["config", "job", "dataset", "template", "grade", "gguf", "ipc", "build_info", "isa"],
    ),
    ("train", &["job", "dataset", "tokenizer", "template", "grade", "kernels", "gguf", "ipc"]),
    ("compress", &["job", "gguf", "llama_log"]),
    ("evaluate", &["engine", "tokenizer", "template", "grade", "job", "gguf", "ipc"]),
    ("engine", &["tokenizer", "ipc", "kernels", "gguf", "llama_log"]),
    ("job", &["dataset", "grade", "gguf"]),
    ("dataset", &["template"]),
    ("config", &["ipc"]),
    ("build_info", &[]),
    ("template", &["gguf"]),
    ("tokenizer", &["gguf", "ipc"]),
    ("grade", &[]),
    ("kernels", &["isa", "gguf"]),
    ("gguf", &[]),
    ("ipc", &[]),
    ("llama_log", &[]),
    ("isa", &[]),
];

/// Modules of the gateway.
const GATEWAY: Table = &[
    ("server", &["job_calls", "api", "auth", "app", "registry", "limits", "store", "error"]),
    ("job_calls", &["api", "generate", "auth", "app", "jobs", "registry", "error"]),
    ("api", &["generate", "stream", "auth", "app", "jobs", "registry", "remote", "store", "error"]),
    ("generate", &["stream", "app", "registry", "error"]),
    ("stream", &["registry", "metrics", "supervisor", "error"]),
    ("app", &["jobs", "registry", "remote", "metrics", "lifecycle", "auth"]),
    ("jobs", &["registry", "memory", "metrics", "store", "error"]),
    ("registry", &["memory", "header", "metrics", "supervisor", "store", "error"]),
    ("memory", &["header"]),
    ("header", &["error"]),
    ("remote", &["error"]),
    ("lifecycle", &[]),
    ("metrics", &["supervisor"]),
    ("supervisor", &[]),
    ("auth", &["limits", "store", "error"]),
    ("store", &[]),
    ("limits", &["error"]),
    ("error", &[]),
];

/// Modules of the engine. `step`, `handle_commands` and `postprocess` are one type in three files,
/// the loop.
const ENGINE: Table = &[
    ("mod", &["input_processor", "step", "commands", "runner"]),
    (
        "step",
        &[
            "output_processor",
            "scheduler",
            "commands",
            "sequence",
            "speculate",
            "kv",
            "runner",
            "grammar",
            "sampler",
            "text",
        ],
    ),
    ("input_processor", &["commands", "sequence", "grammar", "sampler", "text"]),
    ("output_processor", &["scheduler", "sequence", "kv"]),
    ("scheduler", &["sequence", "speculate", "kv", "runner", "grammar", "sampler", "cost"]),
    ("commands", &["sequence", "runner"]),
    ("sequence", &["speculate", "kv", "grammar", "sampler", "text"]),
    ("speculate", &["kv", "runner", "sampler", "cost"]),
    ("kv", &["runner"]),
    ("runner", &[]),
    ("grammar", &["sampler"]),
    ("text", &[]),
    ("sampler", &[]),
    ("cost", &[]),
];

/// Modules of training.
const TRAIN: Table = &[
    ("process", &["recipes", "export", "checkpoint", "random_init", "data", "model", "rollout"]),
    (
        "recipes",
        &[
            "checkpoint",
            "random_init",
            "tokenizer_training",
            "data",
            "model",
            "optim",
            "ops",
            "loss",
            "rollout",
        ],
    ),
    ("export", &["data", "model", "optim"]),
    ("checkpoint", &["optim"]),
    ("random_init", &["tokenizer_training"]),
    ("tokenizer_training", &["data"]),
    ("data", &["model"]),
    ("model", &["ops", "optim"]),
    ("optim", &["ops"]),
    ("loss", &[]),
    ("rollout", &[]),
    ("ops", &[]),
];

/// Folders and files in which `unsafe` is allowed.
const UNSAFE: &[&str] =
    &["compress/", "engine/runner/llama_cpp/", "gguf/", "kernels/", "llama_log.rs"];
const LONGEST_FILE: usize = 800;

/// Every source file with its path relative to `src`, and its text.
fn sources() -> BTreeMap<String, String> {
    fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("readable").flatten() {
            match entry.path() {
                path if path.is_dir() => walk(&path, files),
                path if path.extension().is_some_and(|end| end == "rs") => files.push(path),
                _ => {}
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    walk(&root, &mut files);
    let name = |path: &Path| path.strip_prefix(&root).expect("inside").display().to_string();
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).expect("text"))).collect()
}

fn is_test(file: &str) -> bool {
    file.contains("/tests/") || file.ends_with("tests.rs")
}

/// The module path of a file: `a/b/mod.rs` and `a/b.rs` are `[a, b]`.
fn module(file: &str) -> Vec<&str> {
    let path = file.strip_suffix(".rs").expect("a source file");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    path.split('/').filter(|part| *part != "lib").collect()
}

/// Full paths of a file's imports from this crate, without `crate`.
fn imports(file: &str, text: &str) -> BTreeSet<Vec<String>> {
    let mut found = BTreeSet::new();
    // Ignores everything from the test module on.
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    for statement in text.split("\nuse ").skip(1).chain(text.split("\npub use ").skip(1)) {
        let statement = statement.split(';').next().unwrap_or_default();
        let compact: String = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        for path in expand(&compact) {
            let mut parts: Vec<&str> = path.split("::").map(str::trim).collect();
            let mut full = match parts[0] {
                "crate" | "ingot" => Vec::new(),
                "super" => module(file),
                _ => continue,
            };
            if parts[0] == "super" {
                while parts.first() == Some(&"super") {
                    full.pop();
                    parts.remove(0);
                }
            } else {
                parts.remove(0);
            }
            full.extend(parts);
            found.insert(full.into_iter().map(str::to_owned).collect());
        }
    }
    found.extend(inline_paths(text));
    found
}

/// Paths starting at the crate root that are written in the code itself, such as
/// `crate::job::now()`.
fn inline_paths(text: &str) -> impl Iterator<Item = Vec<String>> {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    // Import lines are parsed separately. A line behind `#[cfg(test)]` is part of a test.
    let code = code.scan("", |before, line| Some((std::mem::replace(before, line), line)));
    let code = code.filter(|(before, _)| before.trim() != "#[cfg(test)]").map(|(_, line)| line);
    let code = code.filter(|line| !line.starts_with("use ") && !line.starts_with("pub use "));
    let paths = code.flat_map(|line| {
        let roots = line.match_indices("crate::").chain(line.match_indices("ingot::"));
        // Neither a visibility nor a text, such as the target of a log line, is a use.
        let used = roots.filter(|(at, _)| {
            let before = &line[..*at];
            !before.ends_with("(in ") && before.matches('"').count().is_multiple_of(2)
        });
        used.map(|(at, root)| &line[at + root.len()..])
    });
    paths.filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
        let path = rest[..end.unwrap_or(rest.len())].trim_end_matches(':');
        (!path.is_empty()).then(|| path.split("::").map(str::to_owned).collect())
    })
}

/// Expands `a::{b, c::{d, e}}` to `a::b`, `a::c::d`, `a::c::e`.
fn expand(tree: &str) -> Vec<String> {
    let Some((head, rest)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        return vec![path.trim().to_owned()];
    };
    let inner = rest.rsplit_once('}').map_or(rest, |(inner, _)| inner);
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, letter) in inner.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inner[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inner[start..]);
    let parts = parts.into_iter().map(str::trim).filter(|part| !part.is_empty());
    parts.flat_map(|part| expand(&format!("{head}{part}"))).collect()
}

/// Imports between modules: importer, imported, and a file with the import. `within` is the parent
/// of the modules; `alias` maps a module to its name in the table.
fn edges(within: &[&str], alias: impl Fn(&str) -> String) -> BTreeMap<(String, String), String> {
    let mut edges = BTreeMap::new();
    for (file, text) in sources().iter().filter(|(file, _)| !is_test(file)) {
        let own = module(file);
        let Some(own) = own.strip_prefix(within) else { continue };
        let from = alias(own.first().copied().unwrap_or("mod"));
        for path in imports(file, text) {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            let Some(below) = path.strip_prefix(within) else { continue };
            let Some(to) = below.first().map(|to| alias(to)) else { continue };
            if from != to {
                edges.entry((from.clone(), to)).or_insert_with(|| file.clone());
            }
        }
    }
    edges
}

/// The imports in `edges` that the table does not allow.
fn violations(
    table: Table,
    prefix: &str,
    edges: &BTreeMap<(String, String), String>,
) -> Vec<String> {
    let place = |room: &str| table.iter().position(|(name, _)| *name == room);
    let mut wrong = Vec::new();
    for (index, (room, allowed)) in table.iter().enumerate() {
        for below in *allowed {
            if place(below).is_none_or(|place| place <= index) {
                wrong.push(format!("the table is no walk: {prefix}{room} -> {below}"));
            }
        }
    }
    for ((from, to), file) in edges {
        // Names that are not in the table are items of the parent: types, functions, constants.
        if place(to).is_none() {
            continue;
        }
        let allowed =
            table.iter().any(|(room, allowed)| room == from && allowed.contains(&to.as_str()));
        if !allowed {
            wrong.push(format!("{prefix}{from} must not import {to} (in {file})"));
        }
    }
    wrong
}

#[test]
fn rooms_import_only_what_stands_below_them() {
    let plain = str::to_owned;
    let mut wrong = violations(ROOMS, "", &edges(&[], plain));
    wrong.extend(violations(GATEWAY, "gateway/", &edges(&["gateway"], plain)));
    let the_loop = |room: &str| match room {
        "handle_commands" | "postprocess" => "step".to_owned(),
        other => other.to_owned(),
    };
    wrong.extend(violations(ENGINE, "engine/", &edges(&["engine"], the_loop)));
    wrong.extend(violations(TRAIN, "train/", &edges(&["train"], plain)));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_scanner_sees_imports() {
    let text = "//! x\nuse std::fs;\nuse crate::gateway::{app::App, error::{self, ApiError}};\n\
                use super::super::kv::Page as P;\npub use super::x;\n    use crate::inner;\n\
                // crate::comment::f()\npub(in crate::gateway) fn f() { crate::job::now(); }\n\
                let x = crate::ipc::Token::default();\n    info!(target: \"ingot::text\", x);\n";
    let found = imports("engine/runner/mock.rs", text);
    let found: Vec<String> = found.into_iter().map(|path| path.join("::")).collect();
    let expected = [
        "engine::kv::Page",
        "engine::runner::x",
        "gateway::app::App",
        "gateway::error::ApiError",
        "gateway::error::self",
        "inner",
        "ipc::Token::default",
        "job::now",
    ];
    assert_eq!(found, expected);
}

#[test]
fn every_room_is_in_a_table() {
    let files = sources();
    for (within, table) in
        [("", ROOMS), ("gateway/", GATEWAY), ("engine/", ENGINE), ("train/", TRAIN)]
    {
        for file in files.keys().filter(|file| !is_test(file)) {
            let Some(rest) = file.strip_prefix(within) else { continue };
            let room = rest.split('/').next().unwrap_or_default().trim_end_matches(".rs");
            let room =
                if ["handle_commands", "postprocess"].contains(&room) { "step" } else { room };
            let known =
                table.iter().any(|(name, _)| *name == room) || ["lib", "mod"].contains(&room);
            assert!(known, "{file}: the room {room} is in no table");
        }
    }
}

#[test]
fn unsafe_stands_in_its_rooms_and_says_why() {
    for (file, text) in sources() {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let word = |word: &str| {
                code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word)
            };
            if !word("unsafe") || code.starts_with("#![") || code.contains('"') {
                continue;
            }
            assert!(
                UNSAFE.iter().any(|room| file.starts_with(room)),
                "{file}:{} has `unsafe`, which stands only in {UNSAFE:?}: {line}",
                at + 1
            );
            // A foreign function type or an `unsafe fn` states its contract in `# Safety`.
            let reason = lines[at.saturating_sub(8)..=at].iter();
            let reason =
                reason.filter(|line| line.contains("SAFETY:") || line.contains("# Safety"));
            let callback = code.contains("unsafe extern \"C\" fn");
            assert!(
                callback || reason.count() > 0,
                "{file}:{}: `unsafe` without its SAFETY reason: {line}",
                at + 1
            );
        }
    }
}

#[test]
fn files_are_short_enough_to_read() {
    for (file, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= LONGEST_FILE, "{file} has {lines} lines, more than {LONGEST_FILE}");
    }
}
