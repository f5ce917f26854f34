//! Datasets of the hub, which is faked here, and once served on the loopback address.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use titan::data::remote::RemoteFiles;
use titan::data::{DatasetSpec, Encode, Loader, LoaderOptions};
use titan::{Error, Result};

use crate::common::*;

/// A repository that counts what is fetched. What is called `slow` does not arrive until `let_go`.
struct FakeHub {
    dir: TempDir,
    names: Vec<&'static str>,
    fetched: Mutex<Vec<String>>,
    let_go: AtomicBool,
}

impl FakeHub {
    fn new(files: &[(&'static str, &[u8])]) -> Arc<Self> {
        let dir = TempDir::new().unwrap();
        for (name, bytes) in files {
            write(&dir, name, bytes);
        }
        let names = files.iter().map(|(name, _)| *name).collect();
        Arc::new(Self { dir, names, fetched: Mutex::default(), let_go: AtomicBool::new(false) })
    }

    fn fetched(&self) -> Vec<String> {
        self.fetched.lock().unwrap().clone()
    }

    fn loader(self: &Arc<Self>, spec: &DatasetSpec, options: LoaderOptions) -> Result<Loader> {
        Loader::new(spec, Some(Arc::new(Bytes)), options, &|_| Ok(self.clone()))
    }
}

impl RemoteFiles for FakeHub {
    fn list(&self, pattern: &str) -> Result<Vec<String>> {
        let pattern = glob::Pattern::new(pattern).unwrap();
        let options = glob::MatchOptions { require_literal_separator: true, ..Default::default() };
        let matching = self.names.iter().filter(|name| pattern.matches_with(name, options));
        Ok(matching.map(|name| name.to_string()).collect())
    }

    fn fetch(&self, file: &str) -> Result<PathBuf> {
        self.fetched.lock().unwrap().push(file.to_owned());
        while file.contains("slow") && !self.let_go.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if file.contains("forbidden") {
            return Err(Error::Hub("403".to_owned()));
        }
        Ok(self.dir.path().join(file))
    }
}

fn spec(dataset: &str, path: Option<&str>) -> DatasetSpec {
    DatasetSpec { dataset: dataset.to_owned(), dataset_path: path.map(str::to_owned), ..DatasetSpec::default() }
}

/// Whether `condition` holds within five seconds.
fn eventually(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(5) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

const C4_TRAIN: [&str; 3] =
    ["en/c4-train.00000-of-00003.json.gz", "en/c4-train.00001-of-00003.json.gz", "en/c4-train.00002-of-00003.json.gz"];
const C4_VALIDATION: &str = "en/c4-validation.00000-of-00001.json.gz";

fn c4() -> Arc<FakeHub> {
    let shard = gzip(&json_lines(&documents(3000)));
    let names = C4_TRAIN.into_iter().chain([C4_VALIDATION, "en.noblocklist/c4-train.00000-of-00001.json.gz"]);
    FakeHub::new(&names.map(|name| (name, &shard[..])).collect::<Vec<_>>())
}

#[test]
fn shards_are_fetched_as_they_are_needed_and_the_next_one_ahead() {
    let hub = c4();
    let mut loader = hub.loader(&spec("c4", None), options(1, 16)).unwrap();
    assert_eq!(hub.fetched(), [""; 0]);
    next(&mut loader);
    assert!(eventually(|| hub.fetched().len() == 2));
    assert_eq!(hub.fetched(), C4_TRAIN[..2]);
}

#[test]
fn a_resumed_run_fetches_only_the_shard_it_was_in() {
    let hub = c4();
    let mut unbroken = hub.loader(&spec("c4", None), options(16, 1024)).unwrap();
    let state = loop {
        next(&mut unbroken);
        if unbroken.state()["file"] == C4_TRAIN[2] {
            break unbroken.state();
        }
    };
    drop(unbroken);
    hub.fetched.lock().unwrap().clear();
    let mut resumed = hub.loader(&spec("c4", None), LoaderOptions { repeat: false, ..options(1, 16) }).unwrap();
    resumed.load_state(&state).unwrap();
    next(&mut resumed);
    assert_eq!(hub.fetched(), C4_TRAIN[2..]);
}

#[test]
fn c4_validation_is_of_the_hub_unless_the_training_set_is_not() {
    let hub = c4();
    let validating =
        |training: &str| DatasetSpec { validates: Some(training.to_owned()), ..spec("c4_validation", None) };
    next(&mut hub.loader(&validating("c4"), options(1, 16)).unwrap());
    assert_eq!(hub.fetched(), [C4_VALIDATION]);
    next(&mut hub.loader(&validating("c4_test"), options(1, 16)).unwrap());
    next(&mut hub.loader(&spec("c4_test", None), options(1, 16)).unwrap());
    assert_eq!(hub.fetched(), [C4_VALIDATION]);
}

#[test]
fn a_hub_dataset_by_name_reads_the_files_of_the_right_split() {
    let lines = |text: &str| json_lines(&[text; 20]);
    let hub = FakeHub::new(&[
        ("README.md", b"# tales"),
        ("dataset_infos.json", b"{}"),
        ("data/train-00000.jsonl", &lines("train")),
        ("data/test-00000.jsonl", &lines("test")),
        ("extra/other.jsonl", &lines("other")),
    ]);
    let words = |spec: DatasetSpec| {
        let mut loader = hub.loader(&spec, LoaderOptions { repeat: false, ..options(1, 8) }).unwrap();
        let mut text = String::new();
        while let Some(batch) = loader.next_batch().unwrap() {
            text.extend(batch.inputs.iter().filter(|&&id| id < BOS).map(|&id| id as u8 as char));
        }
        ["train", "test", "other"].into_iter().filter(|word| text.contains(word)).collect::<Vec<_>>()
    };
    assert_eq!(words(spec("acme/tales", None)), ["train"]);
    assert_eq!(words(spec("acme/tales", Some("extra"))), ["other"]);
    assert_eq!(words(spec("acme/tales", Some("data/*.jsonl"))), ["train", "test"]);
    assert_eq!(words(spec("acme/tales", Some("data/test-00000.jsonl"))), ["test"]);
    let validation = DatasetSpec { validates: Some("acme/tales".to_owned()), ..spec("acme/tales", None) };
    assert_eq!(words(validation.clone()), ["test"]);

    let without = DatasetSpec { dataset_path: Some("extra".to_owned()), ..validation };
    let message = hub.loader(&without, options(1, 8)).err().unwrap().to_string();
    assert!(message.contains("named for validation"), "{message}");
    let message = hub.loader(&spec("acme/tales", Some("nothing")), options(1, 8)).err().unwrap().to_string();
    assert!(message.contains("no file that matches \"nothing/**/*\" ends in .parquet"), "{message}");
}

#[test]
fn a_failed_download_is_an_error_and_is_tried_again() {
    let shard = json_lines(&documents(10));
    let hub = FakeHub::new(&[("a.jsonl", &shard), ("forbidden.jsonl", &shard)]);
    let mut loader = hub.loader(&spec("acme/tales", None), options(1, 16)).unwrap();
    let error = first_error(&mut loader);
    assert!(matches!(&error, Error::Hub(message) if message == "403"), "{error}");
    assert!(matches!(loader.next_batch(), Err(Error::Hub(_))));
}

#[test]
fn dropping_a_loader_ends_its_threads_even_amid_a_download() {
    let shard = json_lines(&documents(2));
    let hub = FakeHub::new(&[("a.jsonl", &shard), ("slow.jsonl", &shard)]);
    let encoder: Arc<dyn Encode> = Arc::new(Bytes);
    let mut loader =
        Loader::new(&spec("acme/tales", None), Some(encoder.clone()), options(1, 4), &|_| Ok(hub.clone())).unwrap();
    next(&mut loader);
    assert!(eventually(|| hub.fetched().len() == 2));
    assert!(Arc::strong_count(&encoder) > 1);

    let start = Instant::now();
    drop(loader);
    assert!(start.elapsed() < Duration::from_secs(1));
    // The reader and the workers hold the encoder as long as they live.
    assert!(eventually(|| Arc::strong_count(&encoder) == 1));
    hub.let_go.store(true, Ordering::Relaxed);
}

#[cfg(feature = "hub")]
#[test]
fn titan_tokenize_reads_the_shards_of_c4_from_the_hub() {
    use crate::hub_server::{HubServer, Kind};
    use titan::data::tokenizer::Tokenizer;

    let server = HubServer::start();
    let texts: Vec<String> = (0..4000).map(|i| format!("Story {i} about the number {}.", i * i)).collect();
    for (name, part) in C4_TRAIN.iter().zip(texts.chunks(1500)) {
        server.add_file(Kind::Dataset, "allenai/c4", name, gzip(&json_lines(part)));
    }
    let home = TempDir::new().unwrap();
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tokenizer");
    let titan = |dataset: &str| {
        let mut titan = assert_cmd::Command::cargo_bin("titan").unwrap();
        titan.current_dir(&home).env("HF_ENDPOINT", &server.url).env("HF_HOME", home.path());
        for variable in ["HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"] {
            titan.env_remove(variable);
        }
        titan.args(["tokenize", "--output=out", "--tokenizer", tokenizer, "--dataset", dataset]).assert()
    };
    titan("c4").success().stdout(predicates::str::starts_with("4,000 documents, "));

    let tokenizer = Tokenizer::from_dir(tokenizer).unwrap();
    let expected: Vec<u32> = texts.iter().flat_map(|text| tokenizer.encode(text, true, true).unwrap()).collect();
    assert_eq!(pass(&crate::common::spec("tokens", home.path().join("out")), None), expected);

    titan("acme/none").failure().code(1).stderr(predicates::str::contains("acme/none"));
}
