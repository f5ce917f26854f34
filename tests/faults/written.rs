//! Files that commands write for their user, while the process dies or the disk fails.

use std::fs;
use std::path::Path;

use crate::binary::{repo, titan};
use crate::bounded::examine;
use crate::common::{files, held};
use crate::preloaded::{operations_of, watch};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[test]
fn what_a_command_writes_has_its_name_when_it_is_whole() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().canonicalize().unwrap();
    let (output, cached) = (folder.join("out"), folder.join("hub/models--acme--tiny"));
    fs::create_dir_all(cached.join("snapshots").join(COMMIT)).unwrap();
    fs::create_dir(cached.join("refs")).unwrap();
    fs::write(cached.join("refs/main"), COMMIT).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(repo("assets/tokenizer").join(file), cached.join("snapshots").join(COMMIT).join(file)).unwrap();
    }
    fs::write(folder.join("words.txt"), "an owl sat in a tree by the sea and sang to the moon\n".repeat(9)).unwrap();
    let tokenize = format!(
        "tokenize --dataset=text --dataset-path=words.txt --output=out --shard-tokens=20 --tokenizer={}",
        repo("assets/tokenizer").display()
    );
    let commands = [
        "write-stories --count=20 --output=out/stories.jsonl",
        "write-stories --count=20 --output=out/stories.jsonl.gz",
        "write-stories --count=20 --output=out/stories.jsonl.zst",
        "train-tokenizer words.txt --vocab-size=300 --output=out",
        &tokenize,
        #[cfg(feature = "hub")]
        "download-tokenizer --repo-id=acme/tiny --local-dir=out",
    ];

    let mut n = 0;
    for line in commands {
        let command = || {
            let _ = fs::remove_dir_all(&output);
            fs::create_dir(&output).unwrap();
            let mut command = titan(&line.split(' ').collect::<Vec<_>>());
            command.current_dir(&folder).env("HF_HOME", &folder).env("HF_HUB_OFFLINE", "1").env_remove("HF_HUB_CACHE");
            command
        };
        let operations = operations_of(&mut command(), &folder, Path::new("out"));
        let whole = files(&output);
        for at in 1..=operations.iter().filter(|operation| operation.name != "log").count() {
            for (fault, cause) in [("kill", ""), ("torn", ""), ("28", "No space left on device")] {
                let mut command = command();
                watch(&mut command, &output);
                let verdict = examine(command.env("FAULT", fault).env("FAULT_AT", at.to_string()));
                // A torn operation that is no write is done.
                if !(fault == "torn" && verdict.code == 0) {
                    verdict.assert_refused(if fault == "28" { 1 } else { 137 }, &[cause]);
                }
                for (path, bytes) in files(&output) {
                    let is_named = !path.file_name().unwrap().to_string_lossy().starts_with(".tmp");
                    assert!(!is_named || whole[&path] == bytes, "{line}: {fault} at {at}: half of {}", path.display());
                }
                n += 1;
            }
        }
    }
    held(
        "death or a full disk while a command writes a file: whole, or not under its name",
        format_args!("{n} of {n}"),
    );
}
