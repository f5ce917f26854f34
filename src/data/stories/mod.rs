//! Simple English stories, the text that titan ships.

mod grammar;

use std::sync::OnceLock;

use grammar::Grammar;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

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

/// The stories that `c4_test` and `c4_validation` hold, as JSON lines packed with zstd.
pub const TRAIN: &[u8] = include_bytes!("../../../assets/data/stories_train.json.zst");
pub const VALIDATION: &[u8] = include_bytes!("../../../assets/data/stories_validation.json.zst");

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// What `titan write-stories` was given to make the shipped files.
    const TRAIN_SEED: u64 = 1;
    const VALIDATION_SEED: u64 = 2;

    fn shipped(packed: &[u8]) -> Vec<String> {
        let lines = String::from_utf8(zstd::decode_all(packed).unwrap()).unwrap();
        let text = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
        lines.lines().map(text).collect()
    }

    #[test]
    fn shipped_stories_are_those_the_grammar_writes() {
        for (packed, seed) in [(TRAIN, TRAIN_SEED), (VALIDATION, VALIDATION_SEED)] {
            for (index, story) in (0..).zip(shipped(packed)) {
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
