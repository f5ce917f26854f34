//! Files that somebody else wrote: read within bounds, and never outside of their folder. Files of our own: whole, or not
//! there.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Component, Path, PathBuf};

use tempfile::NamedTempFile;

/// Values in a JSON file at most. Parsed, a value takes up to some hundred bytes, however few it has in the file; the
/// largest tokenizers have two millions.
const MAX_JSON_VALUES: usize = 4_000_000;

/// All of a file that has at most `max_bytes`. A pipe will do, a device without an end will not.
pub fn read(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(refuse(format!("it is larger than {} MB, which no such file should be", max_bytes / 1_000_000)));
    }
    Ok(bytes)
}

/// A JSON file of at most `max_bytes`, which parsing will not blow up to many times as much.
pub fn read_json(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let bytes = read(path, max_bytes)?;
    match has_too_many_values(&bytes) {
        true => Err(refuse(format!("it holds more than {MAX_JSON_VALUES} values, which no such file should"))),
        false => Ok(bytes),
    }
}

/// Whether a JSON text has so many values that they would take a great multiple of its size. Never false of one that has.
pub fn has_too_many_values(json: &[u8]) -> bool {
    // Each has one of these before it.
    let values = || json.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{' | b':')).count();
    json.len() > MAX_JSON_VALUES && values() > MAX_JSON_VALUES
}

/// The path of a file of `folder`, which must lie inside it, or in the hub's cache from which `folder` is linked.
///
/// # Errors
/// Whatever `name` is, nothing else is opened: a name that leads out of the folder, a link that does, a pipe or a device
/// is refused with [`ErrorKind::InvalidInput`].
pub fn inside(folder: &Path, name: &str) -> io::Result<PathBuf> {
    let outside = || refuse("it leads out of its folder");
    if !is_plain(name) {
        return Err(outside());
    }
    let path = folder.join(name);
    let target = path.canonicalize()?;
    let home = folder.canonicalize()?;
    // {cache}/models--x/snapshots/{revision}/model.safetensors -> {cache}/models--x/blobs/{hash}
    let blobs = match home.parent() {
        Some(snapshots) if snapshots.ends_with("snapshots") => snapshots.with_file_name("blobs"),
        _ => home.clone(),
    };
    if !target.starts_with(&home) && !target.starts_with(&blobs) {
        return Err(outside());
    }
    // To open a pipe is to wait for somebody to write.
    if !fs::metadata(&target)?.is_file() {
        return Err(refuse("it is no file"));
    }
    Ok(path)
}

/// Whether a path from a file stays inside its folder: names only, neither absolute nor with `..`.
pub fn is_plain(path: &str) -> bool {
    !path.is_empty()
        && !path.contains(['\\', '\0'])
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Writes a file that is whole or, whatever happens, as it was before.
pub fn write(path: &Path, content: &mut impl Read) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    io::copy(content, &mut file)?;
    file.keep()
}

/// A file that takes its name, from whatever had it, when it is [kept](Self::keep). Until then it lies beside it under
/// another one, and is removed when dropped.
pub struct NewFile {
    file: NamedTempFile,
    path: PathBuf,
}

impl NewFile {
    /// # Errors
    /// With [`ErrorKind::InvalidInput`] where `path` is a folder or a device, which a file cannot replace.
    pub fn create(path: &Path) -> io::Result<Self> {
        if fs::metadata(path).is_ok_and(|there| !there.is_file()) {
            return Err(refuse("it is no file"));
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut builder = tempfile::Builder::new();
        // Readable for whom any other new file is.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        Ok(Self { file: builder.tempfile_in(folder)?, path: path.to_owned() })
    }

    /// Waits until the file is on the disk, and gives it its name.
    pub fn keep(self) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(self.path)?;
        Ok(())
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn refuse(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidInput, why.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_file_without_an_end_is_read_no_further_than_allowed() {
        assert!(read(Path::new("/dev/zero"), 1000).unwrap_err().to_string().contains("larger than"));
        assert_eq!(read(Path::new("/dev/null"), 0).unwrap(), b"");
    }

    #[test]
    fn json_of_many_values_is_refused_and_json_of_long_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        for (text, is_good) in [(format!("[{}0]", "0,".repeat(4_000_000)), false), (" ".repeat(9_000_000), true)] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_json(&path, 1 << 30).is_ok(), is_good);
        }
    }

    #[test]
    fn a_new_file_takes_its_name_when_it_is_kept_and_never_a_devices() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        fs::write(&path, "old").unwrap();
        let mut file = NewFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        file.keep().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        drop(NewFile::create(&path).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        for other in [Path::new("/dev/null"), folder.path()] {
            assert!(NewFile::create(other).is_err());
        }
    }

    #[test]
    fn only_plain_files_of_the_folder_are_inside() {
        let parent = tempfile::tempdir().unwrap();
        let [folder, outside] = ["folder", "outside"].map(|name| parent.path().join(name));
        fs::create_dir_all(folder.join("sub")).unwrap();
        fs::write(&outside, "").unwrap();
        fs::write(folder.join("sub/file"), "").unwrap();
        for (target, link) in [("sub/file", "good"), ("../outside", "relative"), ("/dev/null", "device")] {
            symlink(target, folder.join(link)).unwrap();
        }
        for name in ["sub/file", "good"] {
            assert_eq!(inside(&folder, name).unwrap(), folder.join(name));
        }
        for name in ["../outside", "/dev/null", "sub", ".", "", "sub/../../outside", "relative", "device", "a\\..\\b"] {
            assert!(inside(&folder, name).is_err(), "{name}");
        }
    }
}
