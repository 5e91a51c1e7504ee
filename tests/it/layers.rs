//! The shape of the source: who imports whom, where `unsafe` may stand, how long a file may be.
//!
//! A module imports only what stands below it on its walk. The tables name, for every room, the
//! rooms that it may import; whoever adds an edge adds it here, and a cycle is refused whatever the
//! tables say. Tests inside `src` are free.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A room, and what it may import.
type Table = &'static [(&'static str, &'static [&'static str])];

/// Rooms of the crate. Gateway and engine meet in `ipc` and nowhere else.
const ROOMS: Table = &[
    ("main", &["cli", "engine", "gateway", "config"]),
    ("cli", &["gateway", "config", "gguf", "ipc"]),
    ("gateway", &["config", "gguf", "ipc"]),
    ("engine", &["ipc"]),
    ("config", &["ipc"]),
    ("gguf", &[]),
    ("ipc", &[]),
];

/// Rooms of the gateway, from the top of the walk down.
const GATEWAY: Table = &[
    ("server", &["api", "app", "auth", "limits", "registry", "store", "error", "lifecycle"]),
    ("api", &["app", "auth", "stream", "template", "registry", "store", "error"]),
    ("stream", &["app", "registry", "supervisor", "metrics", "error"]),
    ("auth", &["app", "limits", "error", "lifecycle"]),
    ("app", &["auth", "limits", "registry", "metrics", "lifecycle"]),
    ("limits", &["error"]),
    ("registry", &["memory", "template", "store", "metrics", "supervisor", "error"]),
    ("memory", &["error"]),
    ("metrics", &["supervisor"]),
    ("supervisor", &[]),
    ("template", &[]),
    ("store", &[]),
    ("lifecycle", &[]),
    ("error", &[]),
];

/// Rooms of the engine, from the top of the walk down. The step loop is one type in several files,
/// which know each other.
const ENGINE: Table = &[
    (
        "loop",
        &[
            "intake",
            "scheduler",
            "kv",
            "runner",
            "sampler",
            "grammar",
            "text",
            "outbox",
            "orders",
            "sequence",
            "tokenizer",
        ],
    ),
    ("intake", &["orders", "sequence", "grammar", "sampler", "text", "tokenizer", "attend"]),
    ("orders", &["sequence", "runner"]),
    ("outbox", &["scheduler", "kv", "sequence"]),
    ("scheduler", &["kv", "sequence", "sampler", "runner"]),
    ("sequence", &["kv", "grammar", "sampler", "text"]),
    ("kv", &["runner"]),
    ("text", &["tokenizer"]),
    ("runner", &["tokenizer"]),
    ("grammar", &["sampler", "tokenizer"]),
    ("sampler", &[]),
    ("tokenizer", &[]),
];
