//! What comes out of each format, and in which order.

use tempfile::TempDir;
use titan::data::LoaderOptions;

use crate::common::*;

#[test]
fn every_format_gives_the_same_tokens() {
    let dir = TempDir::new().unwrap();
    let documents = documents(40);
    for spec in every_format(&dir, &documents) {
        assert_eq!(pass(&spec, None), encoded(&documents), "{spec:?}");
    }
}

#[test]
fn rows_are_consecutive_windows_of_seq_len_plus_one() {
    let dir = TempDir::new().unwrap();
    let documents = documents(40);
    let tokens = encoded(&documents);
    for spec in every_format(&dir, &documents) {
        let mut loader = loader(&spec, options(3, 10)).unwrap();
        for step in 0..4 {
            let batch = next(&mut loader);
            for row in 0..3 {
                let window = &tokens[(step * 3 + row) * 11..][..11];
                assert_eq!(batch.inputs[row * 10..][..10], window[..10]);
                assert_eq!(batch.labels[row * 10..][..10], window[1..]);
            }
        }
    }
}

#[test]
fn training_starts_over_where_the_data_ends_and_validation_stops() {
    let dir = TempDir::new().unwrap();
    let documents = documents(11);
    let tokens = encoded(&documents);
    let spec = spec("json", write(&dir, "a.json", json_lines(&documents)));

    let mut training = loader(&spec, options(2, 12)).unwrap();
    let mut forever = tokens.iter().copied().cycle();
    for _ in 0..40 {
        for row in next(&mut training).labels.chunks(12) {
            let window: Vec<u32> = forever.by_ref().take(13).collect();
            assert_eq!(row, &window[1..]);
        }
    }

    let mut validation = loader(&spec, LoaderOptions { repeat: false, ..options(2, 12) }).unwrap();
    for _ in 0..3 {
        let mut n_batches = 0;
        while let Some(batch) = validation.next_batch().unwrap() {
            assert_eq!(batch.inputs[..12], tokens[n_batches * 26..][..12]);
            n_batches += 1;
        }
        assert_eq!(n_batches, tokens.len() / 26);
        assert_eq!(validation.next_batch().unwrap(), None);
        validation.rewind();
    }
}

#[test]
fn batches_do_not_depend_on_the_number_of_workers() {
    let dir = TempDir::new().unwrap();
    let spec = spec("json", write(&dir, "a.json", json_lines(&documents(100))));
    let run = |n| {
        let mut loader =
            loader(&spec, LoaderOptions { num_workers: Some(n), shuffle: Some(3), ..options(2, 50) }).unwrap();
        (0..50).map(|_| next(&mut loader)).collect::<Vec<_>>()
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(7));
}

#[test]
fn ranks_share_out_the_rows_of_one_order_and_any_can_load_the_state() {
    let dir = TempDir::new().unwrap();
    let spec = spec("json", write(&dir, "a.json", json_lines(&documents(50))));
    let mut whole = loader(&spec, options(6, 9)).unwrap();
    let rank = |dp_rank| loader(&spec, LoaderOptions { dp_rank, dp_degree: 3, ..options(2, 9) }).unwrap();
    let mut ranks = [rank(0), rank(1), rank(2)];
    for _ in 0..10 {
        let together: Vec<u32> = ranks.iter_mut().flat_map(|rank| next(rank).inputs).collect();
        assert_eq!(next(&mut whole).inputs, together);
    }
    assert_eq!(ranks[0].state(), ranks[2].state());
    let mut alone = loader(&spec, options(6, 9)).unwrap();
    alone.load_state(&ranks[1].state()).unwrap();
    assert_eq!(next(&mut alone), next(&mut whole));
}

/// The texts between BOS and EOS.
fn split_documents(tokens: &[u32]) -> Vec<String> {
    let text = |document: &[u32]| document[1..].iter().map(|&id| id as u8 as char).collect();
    tokens.split(|&id| id == EOS).filter(|document| !document.is_empty()).map(text).collect()
}

#[test]
fn shuffling_deals_everything_once_in_another_order() {
    let dir = TempDir::new().unwrap();
    let documents = documents(60);
    let sorted = |mut items: Vec<_>| {
        items.sort();
        items
    };
    for spec in every_format(&dir, &documents) {
        let shuffled = pass(&spec, Some(1));
        assert_eq!(shuffled, pass(&spec, Some(1)), "{spec:?}");
        assert_ne!(shuffled, pass(&spec, Some(2)), "{spec:?}");
        assert_ne!(shuffled, pass(&spec, None), "{spec:?}");
        if spec.dataset == "tokens" {
            // Here it is windows that are shuffled, of 8 ids in `pass`.
            let windows = |tokens: &[u32]| sorted(tokens.chunks_exact(8).map(|window| format!("{window:?}")).collect());
            assert_eq!(windows(&shuffled), windows(&encoded(&documents)));
        } else {
            assert_eq!(sorted(split_documents(&shuffled)), sorted(documents.clone()), "{spec:?}");
        }
    }
}

#[test]
fn each_epoch_is_shuffled_anew() {
    let dir = TempDir::new().unwrap();
    let texts: Vec<String> = (10..60).map(|i| i.to_string()).collect();
    let spec = spec("json", write(&dir, "a.json", json_lines(&texts)));
    // 4 tokens each, so that one batch of 10 rows is one epoch.
    let mut loader = loader(&spec, LoaderOptions { shuffle: Some(5), ..options(10, 19) }).unwrap();
    assert_ne!(next(&mut loader), next(&mut loader));
}
