//! Every real chat template that llama.cpp ships, rendered as jinja2 renders it.
//!
//! `scripts/templates.sh` fetches the templates and writes what jinja2 makes of them; the folder is
//! named by `INGOT_TEST_TEMPLATES`.

#[path = "../templates/check.rs"]
mod check;

use check::check;
use std::path::{Path, PathBuf};

#[test]
fn templates_render_as_jinja2_does() {
    let Some(folder) = std::env::var_os("INGOT_TEST_TEMPLATES").map(PathBuf::from) else {
        let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!ci, "INGOT_TEST_TEMPLATES must name the folder that scripts/templates.sh makes");
        eprintln!("SKIPPED: run scripts/templates.sh and set INGOT_TEST_TEMPLATES to its folder");
        return;
    };
    let conversations =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates/conversations.json");
    let report = check(&[&folder], &conversations, &folder.join("reference.json"));
    eprintln!(
        "{} templates, {} rows: {} equal, {} refused by both ({} with the same message), {} \
         different, {} lenient, {} rescued",
        report.templates,
        report.rows,
        report.equal,
        report.both_raise,
        report.same_refusal,
        report.different.len(),
        report.lenient.len(),
        report.rescued,
    );
    assert!(report.templates >= 50, "some fifty templates, not {}", report.templates);
    assert!(report.equal >= 1000, "most rows are equal: {}", report.equal);
    for difference in report.unexplained() {
        let check::Difference { template, conversation, expected, found } = difference;
        eprintln!("{template}, {conversation}:\n expected {expected:?}\n found    {found:?}");
    }
    assert!(report.unexplained().is_empty(), "every difference is explained in check.rs");
}
