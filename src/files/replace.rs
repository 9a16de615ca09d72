//! Files that are put in place only when they are complete.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Most symbolic links that are followed, as many as Linux does.
const MAX_LINKS: usize = 40;

/// Gives `path` the contents that `write` writes, all of them or none.
///
/// Symbolic links stay: what they lead to is replaced, or made. On Unix the new file gets the mode of the old one, and its owner
/// and group if the system lets us give them.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> io::Result<()> {
    let path = &behind_links(path)?;
    let old = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        old => Some(old?),
    };
    if old.as_ref().is_some_and(|old| !old.is_file()) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file: only regular files are replaced"));
    }
    let (temporary, file) = temporary_beside(path)?;
    // before the contents, which not everybody may be allowed to read
    let inherited = old.map_or(Ok(()), |old| inherit(&file, &old));
    let mut file = BufWriter::with_capacity(1 << 16, file);
    let replaced = inherited
        .and_then(|()| write(&mut file))
        .and_then(|()| file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all())
        .and_then(|()| fs::rename(&temporary, path).map_err(explained));
    if replaced.is_err() {
        // the first error is the one to report
        let _ = fs::remove_file(&temporary);
    }
    replaced
}

/// Where symbolic links lead in the end, whether there is something or not.
fn behind_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_path_buf();
    for _ in 0..=MAX_LINKS {
        if !fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink()) {
            return Ok(path);
        }
        // a relative one counts from the folder that it is in
        let next = fs::read_link(&path)?;
        path = path.parent().unwrap_or(Path::new("")).join(next);
    }
    let reason = format!("its symbolic links form a loop, or are more than {MAX_LINKS}");
    Err(io::Error::new(ErrorKind::InvalidInput, reason))
}

#[cfg(unix)]
fn inherit(file: &File, old: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};

    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        // only the superuser may give files away
        let _ = fchown(file, Some(old.uid()), Some(old.gid()));
    }
    // where modes are equal the file system may have none to set
    if new.mode() == old.mode() { Ok(()) } else { file.set_permissions(old.permissions()) }
}

#[cfg(not(unix))]
fn inherit(_: &File, _: &Metadata) -> io::Result<()> {
    Ok(())
}

fn explained(error: io::Error) -> io::Error {
    if error.kind() != ErrorKind::ResourceBusy {
        return error;
    }
    let reason = format!("{error}: a file that is itself a mount cannot be replaced; mount the folder that holds it");
    io::Error::new(ErrorKind::ResourceBusy, reason)
}

/// A new file in the folder of `path`: only within a folder is renaming sure to be a single step.
fn temporary_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".hymba-{}-{count}.tmp", std::process::id()));
        match File::create_new(&temporary) {
            // left behind by a process that had our number
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            created => return created.map(|file| (temporary, file)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn put(path: &Path, text: &str) -> io::Result<()> {
        replace(path, |file| file.write_all(text.as_bytes()))
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    }

    #[test]
    fn an_interrupted_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        fs::write(&path, "old").unwrap();

        let interrupted = replace(&path, |file| {
            file.write_all(b"new")?;
            Err(io::Error::other("power cut"))
        });
        assert_eq!(interrupted.unwrap_err().to_string(), "power cut");
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(folder.path()), ["model"]);
    }

    #[test]
    fn only_files_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let error = put(folder.path(), "new").unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
        assert!(names(folder.path()).is_empty());
        assert_eq!(put(&folder.path().join("no/model"), "new").unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_file_that_is_a_mount_says_what_to_mount() {
        let error = explained(ErrorKind::ResourceBusy.into());
        assert!(error.to_string().contains("mount the folder"), "{error}");
        assert_eq!(error.kind(), ErrorKind::ResourceBusy);
        assert!(!explained(ErrorKind::NotFound.into()).to_string().contains("mount"));
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_their_targets_are_replaced() {
        use std::os::unix::fs::symlink;

        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::create_dir_all(at("big/old")).unwrap();
        fs::write(at("big/v7"), "old").unwrap();
        // a chain through two folders, one of them itself behind a link
        symlink("big", at("folder")).unwrap();
        symlink("../v7", at("big/old/current")).unwrap();
        symlink("folder/old/current", at("chain")).unwrap();
        symlink(at("big/v8"), at("dangling")).unwrap();
        symlink("nowhere/v9", at("lost")).unwrap();
        symlink("b", at("a")).unwrap();
        symlink("a", at("b")).unwrap();
        symlink("folder", at("to_folder")).unwrap();
        let before = names(folder.path());

        put(&at("chain"), "new").unwrap();
        assert_eq!(fs::read(at("big/v7")).unwrap(), b"new");
        put(&at("dangling"), "eight").unwrap();
        assert_eq!(fs::read(at("big/v8")).unwrap(), b"eight");
        assert_eq!(put(&at("lost"), "").unwrap_err().kind(), ErrorKind::NotFound);
        assert!(put(&at("a"), "").unwrap_err().to_string().contains("loop"));
        assert!(put(&at("to_folder"), "").unwrap_err().to_string().contains("not a regular file"));
        let interrupted = replace(&at("chain"), |_| Err(io::Error::other("power cut")));
        assert!(interrupted.is_err());

        for link in ["folder", "chain", "dangling", "lost", "a", "b", "big/old/current"] {
            assert!(fs::symlink_metadata(at(link)).unwrap().is_symlink(), "{link}");
        }
        assert_eq!(fs::read(at("chain")).unwrap(), b"new");
        assert_eq!(names(folder.path()), before);
        assert_eq!(names(&at("big")), ["old", "v7", "v8"]);
    }

    #[cfg(unix)]
    #[test]
    fn modes_stay() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        put(&path, "new").unwrap();
        fs::write(folder.path().join("other"), "").unwrap();
        assert_eq!(mode(&path), mode(&folder.path().join("other")), "of a new file by the umask");
        for wanted in [0o640, 0o600, 0o666, 0o444, 0o755] {
            fs::set_permissions(&path, fs::Permissions::from_mode(wanted)).unwrap();
            // from the beginning
            let written = replace(&path, |file| {
                assert_eq!(file.get_ref().metadata()?.permissions().mode() & 0o7777, wanted);
                file.write_all(b"new")
            });
            written.unwrap();
            assert_eq!(mode(&path), wanted);
        }
    }
}
