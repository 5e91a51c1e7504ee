//! What README, docs and examples show is accepted: files, commands, specifications, data.

use clap::Parser;
use ingot::cli::Cli;
use ingot::cli::train::read_spec;
use ingot::dataset::{DatasetKind, check};
use ingot::job::spec::Spec;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README, the contribution guide and the pages of `docs/`, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = std::fs::read_dir(root().join("docs")).expect("docs").flatten();
    let docs =
        docs.map(|page| page.path()).filter(|page| page.extension().is_some_and(|x| x == "md"));
    let pages = docs.chain(["README.md", "CONTRIBUTING.md"].map(|page| root().join(page)));
    pages.map(|page| (page.clone(), std::fs::read_to_string(page).expect("text"))).collect()
}

/// Texts between backticks, outside of blocks.
fn inline_code(text: &str) -> Vec<&str> {
    let outside = text.split("```").step_by(2);
    outside.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// The bodies of blocks of a language.
fn blocks<'t>(text: &'t str, language: &str) -> Vec<&'t str> {
    let blocks = text.split("```").skip(1).step_by(2);
    blocks.filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n')).collect()
}

/// Words of a command as a shell sees them, without comment and `&`.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    for letter in line.split(" #").next().unwrap_or_default().chars() {
        match (letter, quote) {
            ('"' | '\'', None) => quote = Some(letter),
            (_, Some(open)) if letter == open => quote = None,
            (' ', None) => words.push(std::mem::take(&mut word)),
            _ => word.push(letter),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty() && word != "&");
    words
}

#[test]
fn files_that_are_named_exist() {
    let mut named = 0;
    for (page, text) in pages() {
        for path in inline_code(&text) {
            let folder = path.split('/').next().unwrap_or_default();
            let is_path = ["src", "tests", "scripts", "configs", "benches", "docs"]
                .contains(&folder)
                && path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
            if is_path && path.contains('/') {
                assert!(root().join(path).exists(), "{} names {path}", page.display());
                named += 1;
            }
        }
    }
    assert!(named > 50, "{named}");
}

#[test]
fn commands_are_accepted() {
    let (mut shown, mut wrong) = (0, Vec::new());
    for (page, text) in pages() {
        let lines = blocks(&text, "sh").into_iter().flat_map(str::lines);
        let inline = inline_code(&text);
        for line in lines.chain(inline.iter().copied()).filter(|line| line.starts_with("ingot ")) {
            // A verb alone is its name.
            let mut words = words(line);
            if words.len() < 3 || line.contains('…') || line.contains('|') {
                continue;
            }
            // N stands for a number.
            words.iter_mut().filter(|word| *word == "N").for_each(|word| *word = "1".into());
            if let Err(error) = Cli::try_parse_from(&words) {
                wrong.push(format!("{}: `{line}`: {error}", page.display()));
            }
            shown += 1;
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(shown > 10, "{shown}");
}

#[test]
fn specifications_are_accepted() {
    let mut shown = 0;
    for (page, text) in pages() {
        for block in blocks(&text, "toml").into_iter().filter(|block| block.contains("kind =")) {
            let spec: Spec = toml::from_str(block)
                .unwrap_or_else(|error| panic!("{}: {error}\n{block}", page.display()));
            spec.resolve().unwrap_or_else(|error| panic!("{}: {error}", page.display()));
            shown += 1;
        }
    }
    assert!(shown > 0);
}

#[test]
fn examples_are_accepted_with_their_data() {
    let mut found = 0;
    for folder in std::fs::read_dir(root().join("configs/examples")).expect("examples").flatten() {
        for file in std::fs::read_dir(folder.path()).expect("a folder").flatten() {
            let path = file.path();
            if path.extension().is_none_or(|end| end != "toml") {
                continue;
            }
            let shown = path.display();
            let text = std::fs::read_to_string(&path).expect("text");
            if !text.contains("kind = ") {
                continue; // A constitution, which a specification names.
            }
            let spec = read_spec(&path).unwrap_or_else(|error| panic!("{shown}: {error}"));
            found += 1;
            if let Some(human) = &spec.data.human {
                let human = folder.path().join(human);
                check(&human, DatasetKind::Preference, 1)
                    .unwrap_or_else(|error| panic!("{}: {error}", human.display()));
            }
            for data in
                [Some(&spec.data.train), spec.data.validation.as_ref()].into_iter().flatten()
            {
                let data = folder.path().join(data);
                // Some say where to get theirs.
                if let Some(dataset) = spec.task.settings().dataset()
                    && (data.exists() || !text.contains("http"))
                {
                    check(&data, dataset, 1)
                        .unwrap_or_else(|error| panic!("{}: {error}", data.display()));
                }
            }
        }
    }
    assert!(found >= 4, "{found}");
}

#[test]
fn readme_is_short() {
    let bytes = std::fs::metadata(root().join("README.md")).expect("README").len();
    assert!(bytes < 9_000, "README.md has {bytes} bytes");
}
