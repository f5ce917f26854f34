//! What can panic or break memory outside of tests says why it does not: each `unsafe`, `expect`, `panic!` and
//! `unreachable!` with its reason beside it; and there is nothing that panics without one. `cargo test --test reasons --
//! --nocapture` lists them.

use std::fs;
use std::path::{Path, PathBuf};

/// Lines above an `unsafe` block that its reason may begin in.
const ABOVE: usize = 6;

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.sort();
    let nested = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![path] };
    let is_source = |path: &PathBuf| path.extension().is_some_and(|it| it == "rs") && !path.ends_with("testing.rs");
    found.into_iter().flat_map(nested).filter(is_source).collect()
}

/// What stands between the quotes that open `text`, if it is more than a word.
fn sentence(text: &str) -> Option<String> {
    let (reason, _) = text.trim_start().strip_prefix('"')?.split_once('"')?;
    reason.contains(' ').then(|| reason.to_owned())
}

/// Whether line `i` of `lines` needs a reason, and the reason if it has one.
fn reason(lines: &[&str], i: usize) -> Option<(&'static str, Option<String>)> {
    let code = lines[i].split("// ").next().unwrap_or_default();
    // A message may begin on the next line.
    let rest = |at: usize| format!("{}{}", &code[at..], lines.get(i + 1).copied().unwrap_or_default());
    for never in [".unwrap()", "println!(", "eprintln!(", " print!(", " eprint!(", "todo!(", "unimplemented!("] {
        if code.contains(never) {
            return Some(("nothing of the kind", None));
        }
    }
    for call in ["panic!(", "unreachable!("] {
        if let Some(at) = code.find(call) {
            return Some(("a message", sentence(&rest(at + call.len()))));
        }
    }
    if let Some(at) = code.find(".expect(")
        // One argument only: there are other methods of that name.
        && !rest(at).split_once('"')?.1.split_once('"')?.1.trim_start().starts_with(',')
    {
        return Some(("a message", sentence(&rest(at + ".expect(".len()))));
    }
    // An unsafe function does nothing unsafe outside of such a block.
    if code.contains("unsafe {") || code.contains("unsafe impl") {
        let mut above = lines[i.saturating_sub(ABOVE)..i].iter().rev();
        return Some((
            "`// SAFETY:` above it",
            above.find_map(|line| line.trim().strip_prefix("// SAFETY: ")).map(str::to_owned),
        ));
    }
    None
}

#[test]
fn all_that_can_panic_or_break_memory_gives_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut faults, mut n) = (Vec::new(), 0);
    for path in sources(&root.join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        let code = text.split("mod tests {").next().unwrap_or_default();
        let lines: Vec<&str> = code.lines().collect();
        for i in (0..lines.len()).filter(|&i| !lines[i].trim_start().starts_with("//")) {
            let Some((wanted, reason)) = reason(&lines, i) else { continue };
            let place = format!("{}:{}: {}", path.strip_prefix(root).unwrap().display(), i + 1, lines[i].trim());
            match reason {
                Some(reason) => println!("{place}\n    {reason}"),
                None => faults.push(format!("{place}\n    = wanted: {wanted}")),
            }
            n += 1;
        }
    }
    assert!(n > 100, "only {n} places were found");
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
