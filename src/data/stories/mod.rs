//! Simple English stories, the text that titan ships.

mod grammar;

use std::sync::OnceLock;

use grammar::Grammar;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// What `c4_test` and `c4_validation` hold: JSON lines, packed with zstd. `titan write-stories` made them with the seeds
/// 1 and 2; they are files so that what a run saw cannot change unnoticed.
pub const TRAIN: &[u8] = include_bytes!("../../../assets/data/stories_train.json.zst");
pub const VALIDATION: &[u8] = include_bytes!("../../../assets/data/stories_validation.json.zst");

/// Words in a story.
const LENGTH: std::ops::RangeInclusive<usize> = 80..=250;

/// Story `index` of the endless series that `seed` begins. The same on every machine.
pub fn document(seed: u64, index: u64) -> String {
    static GRAMMAR: OnceLock<Grammar> = OnceLock::new();
    let grammar = GRAMMAR.get_or_init(|| {
        Grammar::parse(&[
            include_str!("grammar/words.txt"),
            include_str!("grammar/children.txt"),
            include_str!("grammar/animals.txt"),
            include_str!("grammar/tales.txt"),
        ])
    });
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    loop {
        let story = grammar.write("story", &mut rng);
        if LENGTH.contains(&story.split_whitespace().count()) {
            return story;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn shipped(packed: &[u8]) -> Vec<String> {
        let lines = zstd::decode_all(packed).unwrap();
        let records = serde_json::Deserializer::from_slice(&lines).into_iter::<serde_json::Value>();
        records.map(|record| record.unwrap()["text"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn shipped_stories_are_those_the_grammar_writes() {
        for (packed, seed) in [(TRAIN, 1), (VALIDATION, 2)] {
            for (index, story) in (0..).zip(shipped(packed)).step_by(7) {
                assert_eq!(story, document(seed, index), "story {index} of seed {seed}");
            }
        }
    }

    #[test]
    fn no_story_is_shipped_twice_and_none_is_in_both_files() {
        let stories = [shipped(TRAIN), shipped(VALIDATION)].concat();
        assert_eq!(stories.iter().collect::<HashSet<_>>().len(), stories.len());
    }

    #[test]
    fn stories_have_80_to_250_words_of_plain_english_prose() {
        for story in shipped(TRAIN) {
            assert!((80..=250).contains(&story.split_whitespace().count()), "{story}");
            assert!(!story.contains(['{', '}', '[', ']', '|', '=', '/', '¶']), "{story}");
            assert!(!story.contains("  ") && !story.contains(" .") && !story.contains(" ,"), "{story}");
            assert!(story.starts_with(char::is_uppercase) && story.ends_with(['.', '!', '"']), "{story}");
            assert_eq!(story.matches('"').count() % 2, 0, "{story}");
        }
    }

    #[test]
    fn every_sentence_begins_with_a_capital_letter() {
        for story in shipped(VALIDATION) {
            for (i, _) in story.match_indices(". ") {
                assert!(!story[i + 2..].starts_with(char::is_lowercase), "{}: {story}", &story[i..i + 10]);
            }
        }
    }

    #[test]
    fn the_corpus_has_over_two_thousand_words() {
        let mut words = HashSet::new();
        for story in shipped(TRAIN) {
            words.extend(story.split(|c: char| !c.is_alphabetic()).map(str::to_lowercase));
        }
        assert!(words.len() > 2000, "{}", words.len());
    }

    #[test]
    fn many_stories_begin_once_upon_a_time() {
        let stories = shipped(TRAIN);
        let n = stories.iter().filter(|story| story.starts_with("Once upon a time")).count();
        assert!(n * 4 > stories.len(), "{n} of {}", stories.len());
    }
}
