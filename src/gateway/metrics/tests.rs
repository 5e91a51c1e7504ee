use super::*;
use crate::ipc::{EngineError, FinishReason, Progress, Timing};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The value of a sample line such as `name{labels}`.
fn value(text: &str, sample: &str) -> Option<f64> {
    let line = text
        .lines()
        .find(|line| line.strip_prefix(sample).is_some_and(|rest| rest.starts_with(' ')))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[test]
fn a_request_is_counted_once_along_its_way() {
    let metrics = Metrics::new();
    let mut request = metrics.observe("m");
    request.accepted(10);
    request.started(4, 0.5);
    let start = Instant::now();
    request.tokens_at(0, 1, start);
    request.tokens_at(1, 1, start);
    request.tokens_at(0, 2, start + Duration::from_millis(80));
    request.finish(&FinishReason::Length);
    request.finish(&FinishReason::StopString("x".into()));
    request.done(&Timing { prefill_seconds: 0.1, decode_seconds: 0.2, ..Timing::default() });
    drop(request);
    let text = metrics.render(&[], &JobSamples::default());
    let counted = |sample: &str| value(&text, sample).unwrap_or_else(|| panic!("{sample}\n{text}"));
    assert_eq!(counted(r#"ingot_prompt_tokens_total{model="m"}"#), 10.0);
    assert_eq!(counted(r#"ingot_prompt_tokens_cached_total{model="m"}"#), 4.0);
    assert_eq!(counted(r#"ingot_generation_tokens_total{model="m"}"#), 4.0);
    assert_eq!(counted(r#"ingot_time_to_first_token_seconds_count{model="m"}"#), 1.0);
    assert_eq!(counted(r#"ingot_inter_token_latency_seconds_count{model="m"}"#), 2.0);
    assert_eq!(counted(r#"ingot_inter_token_latency_seconds_bucket{model="m",le="0.05"}"#), 2.0);
    assert_eq!(counted(r#"ingot_e2e_request_latency_seconds_count{model="m"}"#), 1.0);
    assert_eq!(counted(r#"ingot_request_success_total{finish_reason="length",model="m"}"#), 1.0);
    assert_eq!(counted(r#"ingot_request_success_total{finish_reason="stop",model="m"}"#), 1.0);
    // Counters begin at 0, including those of events that have not happened.
    let aborted = r#"ingot_request_success_total{finish_reason="abort",model="m"}"#;
    assert_eq!(value(&text, aborted), Some(0.0));
    assert_eq!(value(&text, r#"ingot_request_errors_total{kind="internal",model="m"}"#), Some(0.0));
    assert_eq!(value(&text, r#"ingot_requests_rejected_total{reason="draining"}"#), Some(0.0));
}

#[test]
fn a_dropped_request_is_an_abort_and_a_failed_one_is_not() {
    let metrics = Metrics::new();
    drop(metrics.observe("m"));
    metrics.observe("m").failed(&EngineError::internal("broken"));
    let text = metrics.render(&[], &JobSamples::default());
    assert_eq!(
        value(&text, r#"ingot_request_success_total{finish_reason="abort",model="m"}"#),
        Some(1.0)
    );
    assert_eq!(value(&text, r#"ingot_request_errors_total{kind="internal",model="m"}"#), Some(1.0));
}

#[test]
fn engine_counters_survive_a_restart() {
    let metrics = Metrics::new();
    let sample = |steps, restarts| EngineSample {
        model: "m".into(),
        progress: Progress {
            steps,
            prefix_hits: steps * 2,
            kv_pages_used: 25,
            kv_pages_cached: 25,
            kv_pages_total: 100,
            running: 3,
            ..Progress::default()
        },
        batch_sizes: vec![1, 8],
        restarts,
        pid: None,
    };
    for (steps, restarts, total) in [(100, 0, 100.0), (150, 0, 150.0), (7, 1, 157.0)] {
        let text = metrics.render(&[sample(steps, restarts)], &JobSamples::default());
        assert_eq!(value(&text, r#"ingot_engine_steps_total{model="m"}"#), Some(total));
        assert_eq!(value(&text, r#"ingot_prefix_cache_hits_total{model="m"}"#), Some(total * 2.0));
        let restarts = restarts as f64;
        assert_eq!(value(&text, r#"ingot_engine_restarts_total{model="m"}"#), Some(restarts));
        assert_eq!(value(&text, r#"ingot_kv_cache_usage_ratio{model="m"}"#), Some(0.25));
        assert_eq!(value(&text, r#"ingot_kv_pages{model="m",state="free"}"#), Some(50.0));
    }
    // After an unload, gauges are removed and counters stay.
    let text = metrics.render(&[], &JobSamples::default());
    assert_eq!(value(&text, r#"ingot_requests_running{model="m"}"#), None);
    assert_eq!(value(&text, r#"ingot_engine_steps_total{model="m"}"#), Some(157.0));
    assert_eq!(value(&text, r#"ingot_batch_size_count{model="m"}"#), Some(6.0));
    assert!(
        value(&text, r#"ingot_process_resident_memory_bytes{process="gateway"}"#).unwrap() > 1e6
    );
}

#[test]
fn label_values_are_bounded() {
    let metrics = Metrics::new();
    for number in 0..MAX_MODELS + 50 {
        drop(metrics.observe(&format!("m{number}")));
    }
    let text = metrics.render(&[], &JobSamples::default());
    assert_eq!(
        value(&text, r#"ingot_request_success_total{finish_reason="abort",model="other"}"#),
        Some(50.0)
    );
}

#[test]
fn hostile_label_values_are_escaped() {
    let metrics = Metrics::new();
    drop(metrics.observe("a\"b\\c\nd"));
    assert!(metrics.render(&[], &JobSamples::default()).contains(r#"model="a\"b\\c\nd""#));
}

/// Alerts and panels of series that do not exist would never fire, and stay empty.
#[test]
fn alerts_and_dashboard_use_series_that_exist() {
    let source =
        concat!(include_str!("mod.rs"), include_str!("collect.rs"), include_str!("jobs.rs"));
    for text in [
        include_str!("../../../configs/alerts.yml"),
        include_str!("../../../configs/alerts.test.yml"),
        include_str!("../../../configs/grafana.json"),
    ] {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: BTreeSet<_> = words.filter(|word| word.starts_with("ingot_")).collect();
        assert!(names.len() > 5, "{names:?}");
        for name in names {
            let mut series = ["_bucket", "_sum", "_count"].into_iter();
            let series = series.find_map(|part| name.strip_suffix(part)).unwrap_or(name);
            assert!(source.contains(&format!("\"{series}\"")), "{name}");
        }
    }
}
