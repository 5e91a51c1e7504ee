//! Jobs that are killed, and jobs on a disk that is full: what they end with.

use ingot::gguf::fixture::TinyDecoder;
use ingot::train::job::{DISK_FULL, DONE, Folder, Follower, JobEvent, Order, Outcome, STOPPED};
use ingot::train::spec::Spec;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Points at which a job is killed.
const KILLS: u64 = 50;

/// A job that takes about a second: all weights of a tiny model, a checkpoint every other step.
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
    job.create(&order).expect("written");
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

/// Runs it to its end; the exit code.
fn finish(job: &Folder, more: &[(&str, &str)]) -> Option<u8> {
    let mut child = start(job, more);
    let _leash = child.stdin.take();
    let status = child.wait().expect("it ends");
    status.code().and_then(|code| u8::try_from(code).ok())
}

/// What must not depend on what happened on the way.
fn result(job: &Folder) -> (Vec<u8>, String) {
    assert!(matches!(job.outcome(), Ok(Some(Outcome::Succeeded { .. }))), "{:?}", job.outcome());
    let weights = job.artifacts().join("model.gguf");
    let losses = std::fs::read_to_string(job.artifacts().join("results.csv")).expect("readable");
    (std::fs::read(weights).expect("readable"), losses)
}

#[test]
fn a_job_that_is_killed_at_fifty_points_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = job(&folder.path().join("whole"));
    let begun = Instant::now();
    assert_eq!(finish(&whole, &[]), Some(DONE));
    let took = begun.elapsed();
    let cut = job(&folder.path().join("cut"));
    let (mut killed, mut seed) = (0, 1u64);
    while killed < KILLS {
        let mut child = start(&cut, &[]);
        // Anywhere from its first moment to a share of its time: most die within a few steps.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let share = (seed >> 33) as f64 / f64::from(1u32 << 31);
        std::thread::sleep(took.mul_f64(0.02 + 0.25 * share));
        child.kill().expect("killed");
        let status = child.wait().expect("gone");
        killed += 1;
        if status.signal().is_none() {
            // It was faster: there is nothing left to kill.
            break;
        }
    }
    assert!(killed > 10, "it ended after {killed} kills");
    assert_eq!(finish(&cut, &[]), Some(DONE));
    assert_eq!(result(&whole), result(&cut));
    let steps = |job: &Folder| -> Vec<_> {
        let entries = Follower::new(job.events(), 0).read().expect("readable");
        entries.iter().filter(|entry| matches!(entry.event, JobEvent::Step(_))).count();
        let step = |event: &JobEvent| match event {
            JobEvent::Step(step) => Some((step.step, step.loss.to_bits())),
            _ => None,
        };
        entries.iter().filter_map(|entry| step(&entry.event)).collect()
    };
    assert_eq!(steps(&whole), steps(&cut), "every step is told once");
}

#[test]
fn a_job_leaves_when_it_is_told_to_or_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let job = job(folder.path());
    for alone in [false, true] {
        let mut child = start(&job, &[]);
        let stdin = child.stdin.take();
        let before = steps(&job);
        while steps(&job) < before + 2 {
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
    assert_eq!(newest, steps(&job) as u64, "the last step is saved");
}

fn steps(job: &Folder) -> usize {
    let entries = Follower::new(job.events(), 0).read().expect("readable");
    entries.iter().filter(|entry| matches!(entry.event, JobEvent::Step(_))).count()
}

fn newest_checkpoint(job: &Folder) -> u64 {
    let entries = std::fs::read_dir(job.checkpoints()).expect("readable").flatten();
    let step = |name: &str| name.strip_prefix("step-")?.parse().ok();
    entries.filter_map(|entry| step(entry.file_name().to_str()?)).max().unwrap_or(0)
}

/// A library that makes writes below a folder fail for lack of room from the n-th on.
fn full_disk(folder: &Path) -> PathBuf {
    let source = folder.join("full.c");
    let library = folder.join("full.so");
    let mut file = std::fs::File::create(&source).expect("made");
    file.write_all(
        br#"
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <string.h>
        #include <unistd.h>
        static long left = -1;
        static const char *folder;
        static int full(int fd) {
            char link[64], path[4096];
            if (left < 0) {
                folder = getenv("FULL_BELOW");
                const char *text = getenv("FULL_AFTER");
                left = text ? atol(text) : 1L << 40;
            }
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            ssize_t length = readlink(link, path, sizeof path - 1);
            if (length < 0 || !folder) return 0;
            path[length] = 0;
            if (strncmp(path, folder, strlen(folder)) || strstr(path, "log.txt")) return 0;
            if (left > 0) { left--; return 0; }
            errno = ENOSPC;
            return 1;
        }
        ssize_t write(int fd, const void *bytes, size_t count) {
            static ssize_t (*next)(int, const void *, size_t);
            if (!next) next = dlsym(RTLD_NEXT, "write");
            return full(fd) ? -1 : next(fd, bytes, count);
        }
        "#,
    )
    .expect("written");
    let made = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .status()
        .expect("a C compiler, which the build needs too");
    assert!(made.success());
    library
}

#[test]
fn a_full_disk_stops_a_job_and_spoils_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let library = full_disk(folder.path());
    let whole = job(&folder.path().join("whole"));
    assert_eq!(finish(&whole, &[]), Some(DONE));
    let mut stopped = 0;
    // From the first write on, closely at first, to where it no longer runs out of room.
    for number in 0.. {
        let after = number + number * number / 4;
        let name = format!("cut-{after}");
        let cut = job(&folder.path().join(name));
        let (after, below) = (after.to_string(), cut.path().display().to_string());
        let full = [
            ("LD_PRELOAD", library.to_str().expect("UTF-8")),
            ("FULL_BELOW", below.as_str()),
            ("FULL_AFTER", after.as_str()),
        ];
        let code = finish(&cut, &full);
        if code == Some(DONE) {
            break;
        }
        stopped += 1;
        assert_eq!(code, Some(DISK_FULL), "after {after} writes");
        assert!(matches!(cut.outcome(), Ok(None)), "{:?}", cut.outcome());
        // Once there is room, it goes on.
        assert_eq!(finish(&cut, &[]), Some(DONE), "after {after} writes");
        assert_eq!(result(&whole), result(&cut), "after {after} writes");
    }
    assert!(stopped > 8, "{stopped}");
}
