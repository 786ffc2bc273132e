//! What this machine has: memory and free space on its disks.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::sys::statvfs::statvfs;

/// Returns the free bytes of the disk on which a path lies, or would lie if it existed.
#[allow(clippy::useless_conversion, reason = "some systems have narrower numbers")]
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let path = std::path::absolute(path)?;
    let place = path.ancestors().find(|place| place.exists()).unwrap_or(Path::new("/"));
    let found = statvfs(place).with_context(|| format!("look up the free space at {}", place.display()))?;
    Ok(u64::from(found.blocks_available()).saturating_mul(u64::from(found.fragment_size())))
}

/// Returns the bytes of memory that this process may use: those of the machine, or fewer if a control group limits it. `None` where
/// the system does not say.
pub(crate) fn memory_bytes() -> Option<u64> {
    memory_bytes_in(Path::new("/"))
}

fn memory_bytes_in(root: &Path) -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(root.join(path)).ok();
    let machine = read(Path::new("proc/meminfo")).and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?.trim();
        Some(line.strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
    });
    let groups = read(Path::new("proc/self/cgroup")).unwrap_or_default();
    // The limits of a group and of all that it lies in hold. Within a container the group may be the root of what is mounted.
    let limits = groups.lines().flat_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let (mounted, file) = match controllers {
            "" => ("sys/fs/cgroup", "memory.max"),
            controllers if controllers.split(',').any(|name| name == "memory") => {
                ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => return Vec::new(),
        };
        let group = Path::new(group.trim_start_matches('/'));
        let folders = group.ancestors().map(|folder| Path::new(mounted).join(folder));
        folders.map(|folder| folder.join(file)).collect::<Vec<PathBuf>>()
    });
    // `max` is no limit.
    let limits = limits.filter_map(|path| read(&path)?.trim().parse::<u64>().ok());
    machine.into_iter().chain(limits).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_limits_memory() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let memory = || memory_bytes_in(root.path());
        assert_eq!(memory(), None);
        write("proc/meminfo", "MemFree:          1000 kB\nMemTotal:       8000000 kB\n");
        assert_eq!(memory(), Some(8_192_000_000));
        write("proc/self/cgroup", "0::/pod/container\n");
        write("sys/fs/cgroup/pod/container/memory.max", "max\n");
        assert_eq!(memory(), Some(8_192_000_000));
        write("sys/fs/cgroup/pod/memory.max", "2000000000\n");
        assert_eq!(memory(), Some(2_000_000_000));
        write("sys/fs/cgroup/pod/container/memory.max", "1000000000\n");
        assert_eq!(memory(), Some(1_000_000_000));
        // The first version of control groups. The path of the group is not that within the container.
        write("proc/self/cgroup", "11:cpu,cpuacct:/docker/1\n4:hugetlb,memory:/docker/1\n");
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "500000000\n");
        assert_eq!(memory(), Some(500_000_000));
        // More than the machine has is no limit.
        write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(memory(), Some(8_192_000_000));
    }

    #[test]
    fn a_folder_that_does_not_exist_yet_has_the_free_space_of_its_disk() {
        let folder = tempfile::tempdir().unwrap();
        let free = free_bytes(&folder.path().join("a/b/c")).unwrap();
        assert!(free > 0);
        assert!(free_bytes(Path::new("/proc/self")).unwrap() == 0, "it holds no files of ours");
    }
}
