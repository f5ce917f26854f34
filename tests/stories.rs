//! `titan write-stories`, as a user runs it.

use std::fs;
use std::io::Read;

use assert_cmd::Command;
use predicates::str::contains;
use tempfile::TempDir;
use titan::data::stories;

#[test]
fn every_kind_of_file_holds_the_stories_of_its_seed() {
    let dir = TempDir::new().unwrap();
    for name in ["s.json", "s.json.gz", "s.json.zst"] {
        let mut titan = Command::cargo_bin("titan").unwrap();
        let args = ["write-stories", "--count", "3", "--seed", "5", "--output", name];
        titan.current_dir(dir.path()).args(args).assert().success().stdout(contains("3 stories"));
    }
    let read = |name| fs::read(dir.path().join(name)).unwrap();
    let mut unzipped = Vec::new();
    flate2::read::GzDecoder::new(&read("s.json.gz")[..]).read_to_end(&mut unzipped).unwrap();
    assert_eq!(unzipped, read("s.json"));
    assert_eq!(zstd::decode_all(&read("s.json.zst")[..]).unwrap(), read("s.json"));

    let lines = String::from_utf8(unzipped).unwrap();
    let texts = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].clone());
    assert!(texts.eq((0..3).map(|index| stories::document(5, index))));
}
