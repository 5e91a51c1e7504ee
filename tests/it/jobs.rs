//! Jobs that are killed, and jobs on a full disk: the result is the same as without interruption.

use ingot::gguf::fixture::TinyDecoder;
use ingot::job::spec::Spec;
use ingot::job::{DISK_FULL, DONE, Folder, Follower, JobEvent, Order, Outcome, STOPPED};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Number of points at which a job is killed.
const KILLS: u64 = 50;
const CHECKPOINT_EVERY: u64 = 2;

/// A job that takes about a second: it trains all weights of a tiny model, with a checkpoint every
/// other step.
fn job(folder: &Path) -> Folder {
    std::fs::create_dir_all(folder).expect("a folder");
    let base = folder.join("base.gguf");
    TinyDecoder::new("llama").write(&base).expect("a model");
    let line = |i: usize| {
        let (prompt, completion) = ("ab".repeat(i % 5 + 1), "cd".repeat(i % 3 + 1));
        format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n")
    };
    let text: String = (0..64).map(line).collect();
    std::fs::write(folder.join("train.jsonl"), text).expect("written");
    let spec = r#"{"kind": "sft", "model": "tiny", "data": {"train": "t"}, "adapter": null, "seed": 3,
        "train": {"max_length": 48, "batch_size": 4, "epochs": 4, "checkpoint_every": 2,
        "learning_rate": 0.003, "threads": 1}}"#;
    let spec: Spec = serde_json::from_str(spec).expect("a specification");
    let name = "ft:tiny:ingot::1".to_owned();
    let mut order = Order::new("ftjob-1".into(), spec, name, folder.join("train.jsonl"));
    order.model = Some(base);
    let job = Folder::new(folder.join("job"));
    job.create(&order.into()).expect("written");
    job
}

fn start(job: &Folder, more: &[(&str, &str)]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_ingot"))
        .arg("job")
        .arg(job.path())
        .env("RAYON_NUM_THREADS", "1")
        .envs(more.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs")
}

/// Runs the job until its process exits; returns the exit code.
fn finish(job: &Folder, more: &[(&str, &str)]) -> Option<u8> {
    let mut child = start(job, more);
    let _leash = child.stdin.take();
    let status = child.wait().expect("it ends");
    status.code().and_then(|code| u8::try_from(code).ok())
}

/// The results that must not depend on interruptions.
fn result(job: &Folder) -> (Vec<u8>, String) {
    assert!(matches!(job.outcome(), Ok(Some(Outcome::Succeeded { .. }))), "{:?}", job.outcome());
    let weights = job.artifacts().join("model.gguf");
    let losses = std::fs::read_to_string(job.artifacts().join("results.csv")).expect("readable");
    (std::fs::read(weights).expect("readable"), losses)
}

#[test]
fn a_job_that_is_killed_at_fifty_points_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let hook = Hook::new(folder.path());
    let whole = job(&folder.path().join("whole"));
    let changes = folder.path().join("changes");
    let env = [("HOOK_COUNT", changes.to_str().expect("UTF-8"))];
    assert_eq!(finish(&whole, &hook.env(&whole, &env)), Some(DONE));
    let count = std::fs::read_to_string(&changes).expect("counted");
    let count: u64 = count.trim().parse().expect("a number");
    let checkpoints = told(&whole).len() as u64 / CHECKPOINT_EVERY;
    assert!(count / checkpoints <= KILLS / 2, "{count} changes for {checkpoints} checkpoints");

    let compare = |cut: &Folder| {
        assert_eq!(result(&whole), result(cut));
        assert_eq!(told(&whole), told(cut), "every step is told once");
    };
    let new = |number: u64| job(&folder.path().join(format!("cut-{number}")));
    // Half of the points are spread over the whole job. The other half are consecutive points in
    // its middle, which include every step of writing a checkpoint. A job is killed repeatedly
    // until it ends before the point; then the next job starts.
    let spread = (0..KILLS / 2).map(|i| i * count / (KILLS / 2));
    let dense = (0..KILLS / 2).map(|i| count / 2 + i);
    let mut cut = new(0);
    for (number, point) in spread.chain(dense).enumerate() {
        if kill(&hook, &cut, point) {
            continue;
        }
        compare(&cut);
        cut = new(number as u64 + 1);
        assert!(kill(&hook, &cut, point), "it ends before change {point} of {count}");
    }
    assert_eq!(finish(&cut, &[]), Some(DONE));
    compare(&cut);
}

/// Runs a job that is killed by signal 9 before its n-th change to its files, or, if that change is
/// a write, after half of it. Returns whether the job got that far.
fn kill(hook: &Hook, job: &Folder, point: u64) -> bool {
    let mut child = start(job, &hook.env(job, &[("HOOK_KILL", &point.to_string())]));
    let _leash = child.stdin.take();
    let status = child.wait().expect("gone");
    assert!(status.signal() == Some(9) || status.code() == Some(i32::from(DONE)), "{status}");
    status.signal().is_some()
}

/// The steps in a job's event log, with the bits of their losses.
fn told(job: &Folder) -> Vec<(u64, u64)> {
    let entries = Follower::new(job.events(), 0).read().expect("readable");
    let step = |event: &JobEvent| match event {
        JobEvent::Step(step) => Some((step.step, step.loss.to_bits())),
        _ => None,
    };
    entries.iter().filter_map(|entry| step(&entry.event)).collect()
}

#[test]
fn a_job_leaves_when_it_is_told_to_or_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = job(folder.path());
    for alone in [false, true] {
        let mut child = start(&job, &[]);
        let stdin = child.stdin.take();
        let before = told(&job).len();
        while told(&job).len() < before + 2 {
            assert!(child.try_wait().expect("known").is_none(), "it ended early");
            std::thread::sleep(Duration::from_millis(1));
        }
        if alone {
            drop(stdin);
        } else {
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("told");
        }
        let status = child.wait().expect("gone");
        assert_eq!(status.code(), Some(i32::from(STOPPED)));
    }
    let newest = newest_checkpoint(&job);
    assert_eq!(newest, told(&job).len() as u64, "the last step is saved");
}

fn newest_checkpoint(job: &Folder) -> u64 {
    let entries = std::fs::read_dir(job.checkpoints()).expect("readable").flatten();
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    entries.filter_map(|entry| step(entry.file_name().to_str()?)).max().unwrap_or(0)
}

/// A library that is preloaded before the C library. It wraps the functions that change files below
/// a folder: it counts the changes, kills the process at one of them, or lets writes fail with
/// ENOSPC.
struct Hook(PathBuf);

impl Hook {
    fn new(folder: &Path) -> Self {
        let (source, library) = (folder.join("hook.c"), folder.join("hook.so"));
        std::fs::write(&source, HOOK).expect("written");
        let made = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .status()
            .expect("a C compiler, which the build needs too");
        assert!(made.success());
        Self(library)
    }

    fn env<'a>(&'a self, job: &'a Folder, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
        let below = job.path().to_str().expect("UTF-8");
        let own = [("LD_PRELOAD", self.0.to_str().expect("UTF-8")), ("HOOK_BELOW", below)];
        own.into_iter().chain(more.iter().copied()).collect()
    }
}

const HOOK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static long writes, changes;
static long number(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : -1;
}
static int below(const char *path) {
    const char *folder = getenv("HOOK_BELOW");
    return folder && !strncmp(path, folder, strlen(folder)) && !strstr(path, "log.txt");
}
static int open_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}
static int last(void) { return changes++ == number("HOOK_KILL"); }
static void change(int counts) { if (counts && last()) raise(SIGKILL); }
__attribute__((destructor)) static void count(void) {
    const char *path = getenv("HOOK_COUNT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) { fprintf(file, "%ld\n", changes); fclose(file); }
}
#define NEXT(result, name, ...) \
    static result (*next)(__VA_ARGS__); \
    if (!next) next = dlsym(RTLD_NEXT, #name)
ssize_t write(int fd, const void *bytes, size_t size) {
    NEXT(ssize_t, write, int, const void *, size_t);
    if (!open_below(fd)) return next(fd, bytes, size);
    if (last()) { next(fd, bytes, size / 2); raise(SIGKILL); }
    if (writes++ >= number("HOOK_FULL") && number("HOOK_FULL") >= 0) { errno = ENOSPC; return -1; }
    return next(fd, bytes, size);
}
int fsync(int fd) { NEXT(int, fsync, int); change(open_below(fd)); return next(fd); }
int fdatasync(int fd) { NEXT(int, fdatasync, int); change(open_below(fd)); return next(fd); }
int rename(const char *from, const char *to) {
    NEXT(int, rename, const char *, const char *);
    change(below(to));
    return next(from, to);
}
int mkdir(const char *path, mode_t mode) {
    NEXT(int, mkdir, const char *, mode_t);
    change(below(path));
    return next(path, mode);
}
int unlink(const char *path) { NEXT(int, unlink, const char *); change(below(path)); return next(path); }
int unlinkat(int fd, const char *path, int flags) {
    NEXT(int, unlinkat, int, const char *, int);
    change(open_below(fd));
    return next(fd, path, flags);
}
int rmdir(const char *path) { NEXT(int, rmdir, const char *); change(below(path)); return next(path); }
int ftruncate64(int fd, off64_t size) {
    NEXT(int, ftruncate64, int, off64_t);
    change(open_below(fd));
    return next(fd, size);
}
"#;

#[test]
fn a_full_disk_stops_a_job_and_spoils_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let hook = Hook::new(folder.path());
    let whole = job(&folder.path().join("whole"));
    assert_eq!(finish(&whole, &[]), Some(DONE));
    let mut stopped = 0;
    // The disk is full from the n-th write on, with n in growing steps until the job completes.
    for number in 0.. {
        let after = number + number * number / 4;
        let name = format!("cut-{after}");
        let cut = job(&folder.path().join(name));
        let after = after.to_string();
        let code = finish(&cut, &hook.env(&cut, &[("HOOK_FULL", &after)]));
        if code == Some(DONE) {
            break;
        }
        stopped += 1;
        assert_eq!(code, Some(DISK_FULL), "after {after} writes");
        assert!(matches!(cut.outcome(), Ok(None)), "{:?}", cut.outcome());
        // Once there is space, the job resumes.
        assert_eq!(finish(&cut, &[]), Some(DONE), "after {after} writes");
        assert_eq!(result(&whole), result(&cut), "after {after} writes");
    }
    assert!(stopped > 8, "{stopped}");
}
