//! A resumed loader yields what the unbroken one would have.

use proptest::prelude::*;
use tempfile::TempDir;
use titan::data::{DatasetSpec, LoaderOptions};

use crate::common::*;

/// Resumes at each of the first `n` batches, and compares those that follow.
pub fn assert_resumes_exactly(spec: &DatasetSpec, options: &LoaderOptions, n: usize) {
    let mut unbroken = loader(spec, options.clone()).unwrap();
    let mut states = vec![unbroken.state()];
    let mut batches = Vec::new();
    for _ in 0..n {
        batches.push(next(&mut unbroken));
        states.push(unbroken.state());
    }
    let mut resumed = loader(spec, LoaderOptions { num_workers: Some(1), ..options.clone() }).unwrap();
    for (taken, state) in states.iter().enumerate().take(n) {
        let state = serde_json::from_str(&state.to_string()).unwrap();
        resumed.load_state(&state).unwrap();
        assert_eq!(resumed.state(), state);
        for (i, expected) in batches.iter().enumerate().skip(taken).take(6) {
            assert_eq!(next(&mut resumed), *expected, "batch {i} after {taken} taken, {spec:?}, {options:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    /// About three passes, so that documents, files and epochs end at many places within rows.
    #[test]
    fn resuming_anywhere_repeats_the_unbroken_run(
        texts in prop::collection::vec("[a-zé\n ]{0,40}", 6..25),
        batch_size in 1..3usize,
        seq_len in 1..24usize,
        shuffle in prop::option::of(0..9u64),
    ) {
        let dir = TempDir::new().unwrap();
        let n_tokens = encoded(&texts).len();
        let n_batches = (3 * n_tokens / (batch_size * (seq_len + 1))).min(25);
        for spec in every_format(&dir, &texts) {
            // Empty text files are no documents, so there may be too little.
            if pass(&spec, None).len() > seq_len {
                assert_resumes_exactly(&spec, &LoaderOptions { shuffle, ..options(batch_size, seq_len) }, n_batches);
            }
        }
    }
}

#[test]
fn a_file_of_many_shuffled_blocks_resumes_anywhere() {
    let dir = TempDir::new().unwrap();
    let texts: Vec<String> = (0..10_000).map(|i| i.to_string()).collect();
    let json = spec("json", write(&dir, "a.json.gz", gzip(&json_lines(&texts))));
    let rows: Vec<_> = texts.iter().map(|text| Some(text.as_str())).collect();
    let parquet = spec("parquet", write(&dir, "a.parquet", parquet(&rows)));
    for spec in [json, parquet] {
        assert_resumes_exactly(&spec, &LoaderOptions { shuffle: Some(1), ..options(2, 2500) }, 25);
    }
}

#[test]
fn a_text_file_of_many_pieces_is_one_document_and_resumes_anywhere() {
    let dir = TempDir::new().unwrap();
    // Paragraphs, then lines, then neither; with characters of several bytes.
    let paragraphs: String = (0..9000).map(|i| format!("Paragraph {i} ü\nsecond line\n\n")).collect();
    let lines: String = (0..9000).map(|i| format!("line {i} ß\n")).collect();
    let text = paragraphs + &lines + &"x€".repeat(50_000);

    let plain = spec("text", write(&dir, "book.txt", format!("\u{feff}{text}")));
    assert_eq!(pass(&plain, None), encoded(&[&text]));
    assert_resumes_exactly(&plain, &options(2, 20_000), 18);
    let compressed = spec("text", write(&dir, "book.txt.gz", gzip(text.as_bytes())));
    assert_eq!(pass(&compressed, None), encoded(&[&text]));
    assert_resumes_exactly(&compressed, &options(2, 20_000), 18);
}

#[test]
fn a_resumed_shuffle_keeps_its_own_seed() {
    let dir = TempDir::new().unwrap();
    let spec = spec("json", write(&dir, "a.json", json_lines(&documents(60))));
    let with_seed = |seed| loader(&spec, LoaderOptions { shuffle: Some(seed), ..options(2, 16) }).unwrap();
    let mut unbroken = with_seed(1);
    next(&mut unbroken);
    let mut resumed = with_seed(2);
    resumed.load_state(&unbroken.state()).unwrap();
    assert_eq!(next(&mut resumed), next(&mut unbroken));
}

#[test]
fn a_resumed_run_finds_its_file_by_name() {
    let dir = TempDir::new().unwrap();
    write(&dir, "b.json", json_lines(&documents(20)));
    write(&dir, "c.json", json_lines(&documents(9)));
    let spec = spec("json", dir.path());
    let mut unbroken = loader(&spec, options(1, 16)).unwrap();
    next(&mut unbroken);
    let state = unbroken.state();

    write(&dir, "a.json", json_lines(&documents(3)));
    let mut resumed = loader(&spec, options(1, 16)).unwrap();
    resumed.load_state(&state).unwrap();
    assert_eq!(next(&mut resumed), next(&mut unbroken));

    std::fs::remove_file(dir.path().join("b.json")).unwrap();
    let mut over = loader(&spec, options(1, 16)).unwrap();
    let first = next(&mut over);
    over.load_state(&state).unwrap();
    assert_eq!(next(&mut over), first);
}

#[test]
fn a_state_is_small_however_many_files_there_are() {
    let dir = TempDir::new().unwrap();
    for i in 0..2000 {
        write(&dir, &format!("a-folder-with-a-long-name/{}/{i:05}.txt", i % 2), "some text");
    }
    let mut loader = loader(&spec("text", dir.path()), options(2, 8)).unwrap();
    next(&mut loader);
    assert!(loader.state().to_string().len() < 64 * 1024);
}
