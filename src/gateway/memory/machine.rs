//! Memory still available to this process tree: of the machine, and within its control groups.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes available without swapping: the smaller of `MemAvailable` and the headroom of each
/// control group above this process. Page cache counts as available: the kernel can reclaim it.
pub fn available() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = group_headroom(&groups, Path::new("/sys/fs/cgroup"));
    machine.into_iter().chain(group).min().unwrap_or(u64::MAX)
}

/// `MemAvailable`, in bytes, of `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The smallest headroom of this process's group and all groups above it, for versions 1 and 2.
fn group_headroom(groups: &str, root: &Path) -> Option<u64> {
    let mut least = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (base, files) = match controllers {
            "" => (root.to_owned(), V2),
            list if list.split(',').any(|name| name == "memory") => (root.join("memory"), V1),
            _ => continue,
        };
        // In a container the path may not exist below the mount; then the mount's root is the
        // group.
        let full: PathBuf = base.join(path.trim_start_matches('/'));
        for folder in full.ancestors().take_while(|folder| folder.starts_with(&base)) {
            least = least.into_iter().chain(headroom(folder, files)).min();
        }
    }
    least
}

/// Names of the files of limit and usage, and of the reclaimable entries of `memory.stat`.
type Files = (&'static str, &'static str, [&'static str; 2]);
const V2: Files = ("memory.max", "memory.current", ["inactive_file", "active_file"]);
const V1: Files = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ["total_inactive_file", "total_active_file"],
);

fn headroom(folder: &Path, (limit, usage, cache): Files) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(folder.join(name)).ok()?.trim().parse().ok()
    };
    // "max" is not a number: there is no limit.
    let limit = number(limit)?;
    let usage = number(usage)?;
    let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let reclaimable: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| cache.contains(name))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(usage.saturating_sub(reclaimable)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       32 kB\nMemAvailable:   23762412 kB\n";
        assert_eq!(mem_available(text), Some(23_762_412 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB"), None);
    }

    #[test]
    fn the_tightest_group_above_us_counts() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("memory.max"), "max\n").unwrap();
        fs::write(inner.join("memory.current"), "5\n").unwrap();
        fs::write(root.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(root.path().join("a/memory.current"), "700\n").unwrap();
        fs::write(
            root.path().join("a/memory.stat"),
            "anon 500\nactive_file 50\ninactive_file 150\n",
        )
        .unwrap();
        assert_eq!(group_headroom("0::/a/b\n", root.path()), Some(500));
        assert_eq!(group_headroom("0::/gone\n", root.path()), None);
        assert_eq!(group_headroom("3:cpu:/\nnonsense\n", root.path()), None);
    }

    #[test]
    fn version_one_groups_count_too() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("memory/x");
        fs::create_dir_all(&group).unwrap();
        fs::write(group.join("memory.limit_in_bytes"), "4096\n").unwrap();
        fs::write(group.join("memory.usage_in_bytes"), "1096\n").unwrap();
        fs::write(group.join("memory.stat"), "total_inactive_file 96\n").unwrap();
        assert_eq!(group_headroom("4:memory:/x\n0::/\n", root.path()), Some(3096));
    }

    #[test]
    fn this_machine_has_some() {
        assert!(available() > 1 << 20);
    }
}
