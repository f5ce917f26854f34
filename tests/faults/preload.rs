//! Preloaded into titan by the drills (`LD_PRELOAD`): sees every operation on the files below a folder before the system
//! does, counts them, and at one of them has the process die, or the disk fail.
//!
//! `FAULT_ROOT`   the folder, absolute
//! `FAULT_AT`     the operation that meets the fault, from 1; none if unset
//! `FAULT`        `kill` dies before it; `torn` dies in the middle of a write; `short` writes half and says so; a number
//!                fails with that errno, as do all operations after it, except that EIO comes once
//! `FAULT_LOG`    a file that hears of each operation that succeeded: `name \t path \t second path \t length \n` and as
//!                many bytes of data; lines of standard error come as `log`
//! `FAULT_FREE`   what the file systems say that they have free, in bytes
//!
//! Nothing is really synced: a drill that dies does not take the machine with it.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::mem::transmute;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard};

const O_WRONLY: c_int = 1;
const O_CREAT: c_int = 0o100;
const O_APPEND: c_int = 0o2000;
const AT_FDCWD: c_int = -100;
const EIO: c_int = 5;
const RTLD_NEXT: *mut c_void = -1isize as *mut c_void;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn _exit(code: c_int) -> !;
    fn __errno_location() -> *mut c_int;
}

/// The function that would have been called without this library.
macro_rules! real {
    ($name:ident($($argument:expr),*): fn($($type:ty),*) -> $result:ty) => {{
        let symbol = unsafe { dlsym(RTLD_NEXT, concat!(stringify!($name), "\0").as_ptr().cast()) };
        // SAFETY: this is the C library's function of that name, which has that type.
        unsafe { transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> $result>(symbol)($($argument),*) }
    }};
}

struct Faults {
    root: PathBuf,
    at: Option<u64>,
    fault: Fault,
    log: c_int,
    /// Operations so far.
    count: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Kill,
    Torn,
    Short,
    Errno(c_int),
}

/// What becomes of an operation.
enum Fate {
    /// It is done.
    Done,
    /// A write does half of its work, and the process dies if so.
    Half {
        dies: bool,
    },
    Fails(c_int),
}

static FAULTS: LazyLock<Mutex<Faults>> = LazyLock::new(|| {
    let get = |name: &str| std::env::var(name).ok();
    let fault = match get("FAULT").as_deref() {
        Some("torn") => Fault::Torn,
        Some("short") => Fault::Short,
        Some(number) if number != "kill" => Fault::Errno(number.parse().expect("FAULT is an errno")),
        _ => Fault::Kill,
    };
    let log = get("FAULT_LOG").map_or(-1, |path| {
        real!(open64((path + "\0").as_ptr().cast(), O_WRONLY | O_CREAT | O_APPEND, 0o644): fn(*const c_char, c_int, c_uint) -> c_int)
    });
    let at = get("FAULT_AT").map(|at| at.parse().expect("FAULT_AT is a number"));
    Mutex::new(Faults { root: get("FAULT_ROOT").unwrap_or_default().into(), at, fault, log, count: 0 })
});

/// `None`: not below the folder.
fn below_root(path: &Path) -> Option<(PathBuf, MutexGuard<'static, Faults>)> {
    let faults = FAULTS.lock().unwrap();
    let path = absolute(path);
    path.starts_with(&faults.root).then_some((path, faults))
}

fn absolute(path: &Path) -> PathBuf {
    let here = if path.is_absolute() { PathBuf::new() } else { std::env::current_dir().unwrap_or_default() };
    here.join(path).components().filter(|part| *part != Component::CurDir).collect()
}

impl Faults {
    fn next(&mut self) -> Fate {
        self.count += 1;
        match (self.at, self.fault) {
            (Some(at), Fault::Errno(errno)) if self.count == at || (self.count > at && errno != EIO) => {
                Fate::Fails(errno)
            }
            (Some(at), fault) if self.count == at => match fault {
                // SAFETY: ends the process.
                Fault::Kill => unsafe { _exit(137) },
                fault => Fate::Half { dies: fault == Fault::Torn },
            },
            _ => Fate::Done,
        }
    }

    fn note(&self, name: &str, path: &Path, other: &Path, data: &[u8]) {
        if self.log < 0 {
            return;
        }
        let mut line = format!("{name}\t{}\t{}\t{}\n", path.display(), other.display(), data.len()).into_bytes();
        line.extend(data);
        real!(write(self.log, line.as_ptr().cast(), line.len()): fn(c_int, *const c_void, usize) -> isize);
    }
}

/// Counts an operation that is no write, does it unless it is to fail, and notes it.
fn act(name: &str, path: PathBuf, operation: impl FnOnce() -> c_int) -> c_int {
    act_on_two(name, path, Path::new(""), operation)
}

fn act_on_two(name: &str, path: PathBuf, other: &Path, operation: impl FnOnce() -> c_int) -> c_int {
    let Some((path, mut faults)) = below_root(&path) else { return operation() };
    if let Fate::Fails(errno) = faults.next() {
        return failed(errno);
    }
    let result = operation();
    if result >= 0 {
        faults.note(name, &path, other, &[]);
    }
    result
}

fn failed(errno: c_int) -> c_int {
    // SAFETY: the C library has such a number for each thread.
    unsafe { *__errno_location() = errno };
    -1
}

fn path_of(path: *const c_char) -> PathBuf {
    // SAFETY: callers of the C library pass strings that end.
    PathBuf::from(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()))
}

fn path_at(folder: c_int, path: *const c_char) -> PathBuf {
    let path = path_of(path);
    if folder == AT_FDCWD { path } else { path_of_file(folder).join(path) }
}

fn path_of_file(file: c_int) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{file}")).unwrap_or_default()
}

fn opening(flags: c_int) -> &'static str {
    if flags & O_CREAT != 0 { "create" } else { "open" }
}

#[unsafe(no_mangle)]
pub extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    act(opening(flags), path_of(path), || real!(open64(path, flags, mode): fn(*const c_char, c_int, c_uint) -> c_int))
}

#[unsafe(no_mangle)]
pub extern "C" fn openat64(folder: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    act(
        opening(flags),
        path_at(folder, path),
        || real!(openat64(folder, path, flags, mode): fn(c_int, *const c_char, c_int, c_uint) -> c_int),
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn write(file: c_int, data: *const c_void, len: usize) -> isize {
    let write = |len| real!(write(file, data, len): fn(c_int, *const c_void, usize) -> isize);
    // SAFETY: callers pass as many bytes as they say.
    let bytes = |len| unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
    if file == 2 {
        FAULTS.lock().unwrap().note("log", Path::new(""), Path::new(""), bytes(len));
        return write(len);
    }
    let Some((path, mut faults)) = below_root(&path_of_file(file)) else { return write(len) };
    let written = match faults.next() {
        Fate::Fails(errno) => return failed(errno) as isize,
        Fate::Done => write(len),
        Fate::Half { dies } => {
            let written = write(len.div_ceil(2));
            if dies {
                // SAFETY: ends the process.
                unsafe { _exit(137) };
            }
            written
        }
    };
    faults.note("write", &path, Path::new(""), bytes(written.max(0) as usize));
    written
}

#[unsafe(no_mangle)]
pub extern "C" fn fsync(file: c_int) -> c_int {
    act("sync", path_of_file(file), || 0)
}

#[unsafe(no_mangle)]
pub extern "C" fn fdatasync(file: c_int) -> c_int {
    fsync(file)
}

#[unsafe(no_mangle)]
pub extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    act_on_two(
        "rename",
        path_of(from),
        &absolute(&path_of(to)),
        || real!(rename(from, to): fn(*const c_char, *const c_char) -> c_int),
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn unlink(path: *const c_char) -> c_int {
    act("remove", path_of(path), || real!(unlink(path): fn(*const c_char) -> c_int))
}

#[unsafe(no_mangle)]
pub extern "C" fn unlinkat(folder: c_int, path: *const c_char, flags: c_int) -> c_int {
    act(
        "remove",
        path_at(folder, path),
        || real!(unlinkat(folder, path, flags): fn(c_int, *const c_char, c_int) -> c_int),
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn rmdir(path: *const c_char) -> c_int {
    act("remove", path_of(path), || real!(rmdir(path): fn(*const c_char) -> c_int))
}

#[unsafe(no_mangle)]
pub extern "C" fn mkdir(path: *const c_char, mode: c_uint) -> c_int {
    act("folder", path_of(path), || real!(mkdir(path, mode): fn(*const c_char, c_uint) -> c_int))
}

/// `struct statvfs` of Linux on 64 bits, as far as it matters here.
#[repr(C)]
pub struct Statvfs {
    block_size: u64,
    fragment_size: u64,
    blocks: u64,
    free: u64,
    available: u64,
    rest: [u64; 9],
}

#[unsafe(no_mangle)]
pub extern "C" fn statvfs(path: *const c_char, facts: *mut Statvfs) -> c_int {
    let result = real!(statvfs(path, facts): fn(*const c_char, *mut Statvfs) -> c_int);
    if let (0, Ok(bytes)) = (result, std::env::var("FAULT_FREE")) {
        // SAFETY: the call above succeeded, so this is memory for the answer.
        unsafe { (*facts).available = bytes.parse::<u64>().expect("FAULT_FREE is a number") / (*facts).fragment_size };
    }
    result
}
