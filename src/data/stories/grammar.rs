//! A grammar that writes one story at a time.
//!
//! A rule is a name at the start of a line with its alternatives below it, each on a line of its own, indented by two
//! spaces, or several on a line with `|` between them; lines indented further continue the one above. `#` begins a
//! comment. In an alternative
//!
//! - `[a|b|]` is one of its parts;
//! - `{rule}` is one of the rule's alternatives, the earlier the likelier, never the same twice in a row;
//! - `{name=rule}` writes nothing, but chooses a value for `{name}` to stand for until the end of the story, different
//!   from all values chosen before;
//! - `{Name}` is `{name}` with a capital letter;
//! - `¶` begins a paragraph; `a` becomes `an` by itself.
//!
//! What follows `/` in an alternative is no text. It is `f` or `m` for somebody, so that `{hero.he}` is "she" or "he";
//! an irregular plural for `{toy.s}`; or the preposition with which `{place.at}` says where.

use std::collections::HashMap;

use rand_chacha::rand_core::RngCore;

pub struct Grammar {
    rules: HashMap<&'static str, Vec<String>>,
}

/// What a rule yielded: its text, and what stood behind the `/`.
#[derive(Clone)]
struct Value {
    text: String,
    note: String,
}

/// Forms by gender: name, for `f`, for `m`.
const FORMS: [(&str, &str, &str); 9] = [
    ("he", "she", "he"),
    ("him", "her", "him"),
    ("his", "her", "his"),
    ("himself", "herself", "himself"),
    ("girl", "girl", "boy"),
    ("woman", "woman", "man"),
    ("king", "queen", "king"),
    ("prince", "princess", "prince"),
    ("partner", "prince", "princess"),
];

impl Grammar {
    /// Reads rules from `sources`, whose names must differ.
    pub fn parse(sources: &[&'static str]) -> Self {
        let mut rules: HashMap<&'static str, Vec<String>> = HashMap::new();
        let mut name = "";
        for line in sources.iter().flat_map(|source| source.lines()).filter(|line| !line.starts_with('#')) {
            match line.len() - line.trim_start().len() {
                0 if line.is_empty() => {}
                0 => {
                    name = line;
                    assert!(rules.insert(name, Vec::new()).is_none(), "two rules are called {name}");
                }
                indent => {
                    let alternatives = rules.get_mut(name).expect("a rule's name comes before its alternatives");
                    match alternatives.last_mut() {
                        Some(last) if indent > 2 => {
                            last.push(' ');
                            last.push_str(line.trim());
                        }
                        _ => alternatives.extend(split(line).map(|part| part.trim().to_owned())),
                    }
                }
            }
        }
        Self { rules }
    }

    /// One text of the rule `start`.
    pub fn write(&self, start: &str, rng: &mut impl RngCore) -> String {
        let mut writer = Writer { grammar: self, rng, chosen: HashMap::new(), last: HashMap::new() };
        tidy(&writer.draw(start).text)
    }
}

struct Writer<'a, R> {
    grammar: &'a Grammar,
    rng: &'a mut R,
    chosen: HashMap<&'a str, Value>,
    /// The alternative of each rule that was drawn last.
    last: HashMap<&'a str, usize>,
}

impl<'a, R: RngCore> Writer<'a, R> {
    /// A number below `n`. Written out, so that the stories do not depend on a library's way of drawing numbers.
    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.rng.next_u32()) * n as u64) >> 32) as usize
    }

    /// A number below `n`, `i` as likely as `(i + 1)` to the power of -3/2: as in real text, some things are told again and again and many
    /// but once in a while.
    fn early(&mut self, n: usize) -> usize {
        const WHOLE: usize = 1 << 16;
        let weight = |i: usize| WHOLE / (i + 1).pow(3).isqrt();
        let mut left = self.below((0..n).map(weight).sum());
        (0..n)
            .find(|i| {
                let here = left < weight(*i);
                left = left.wrapping_sub(weight(*i));
                here
            })
            .expect("the weights add up to the whole")
    }

    fn draw(&mut self, rule: &str) -> Value {
        let (rule, alternatives) = self.grammar.rules.get_key_value(rule).unwrap_or_else(|| panic!("no rule `{rule}`"));
        let mut i = self.early(alternatives.len());
        while alternatives.len() > 1 && self.last.get(rule) == Some(&i) {
            i = self.early(alternatives.len());
        }
        self.last.insert(rule, i);
        let (text, note) = alternatives[i].rsplit_once('/').unwrap_or((&alternatives[i], ""));
        let mut value = Value { text: String::new(), note: note.to_owned() };
        self.expand(text, &mut value.text);
        value
    }

    fn expand(&mut self, mut text: &'a str, out: &mut String) {
        while let Some(start) = text.find(['{', '[']) {
            let end = start + closing(&text[start..]);
            let inside = &text[start + 1..end];
            out.push_str(&text[..start]);
            if text[start..].starts_with('[') {
                let n = split(inside).count();
                let i = self.below(n);
                self.expand(split(inside).nth(i).unwrap_or_default(), out);
            } else if let Some((name, rule)) = inside.split_once('=') {
                let value = self.draw_other_than_chosen(rule);
                self.chosen.insert(name, value);
            } else {
                self.slot(inside, out);
            }
            text = &text[end + 1..];
        }
        out.push_str(text);
    }

    fn draw_other_than_chosen(&mut self, rule: &str) -> Value {
        loop {
            let value = self.draw(rule);
            if self.chosen.values().all(|chosen| chosen.text != value.text) {
                return value;
            }
        }
    }

    /// `name` or `name.form`.
    fn slot(&mut self, slot: &'a str, out: &mut String) {
        let (name, form) = slot.split_once('.').unwrap_or((slot, ""));
        let lower = name[..1].to_lowercase() + &name[1..];
        let value = self.chosen.get(lower.as_str()).cloned().unwrap_or_else(|| self.draw(&lower));
        let text = match form {
            "" => value.text,
            "at" => format!("{} {}", value.note, value.text),
            "s" if value.note.is_empty() => value.text + "s",
            "s" => value.note,
            _ => {
                let (_, f, m) =
                    FORMS.iter().find(|(name, ..)| *name == form).unwrap_or_else(|| panic!("no form `{slot}`"));
                match value.note.as_str() {
                    "f" => (*f).to_owned(),
                    "m" => (*m).to_owned(),
                    _ => panic!("`{slot}`: {} is neither f nor m", value.text),
                }
            }
        };
        if name.starts_with(char::is_uppercase) {
            out.push_str(&text[..1].to_uppercase());
            out.push_str(&text[1..]);
        } else {
            out.push_str(&text);
        }
    }
}

/// Where the bracket that `text` begins with is closed.
fn closing(text: &str) -> usize {
    let mut depth = 0;
    let end = text.find(|c| {
        depth += i32::from(c == '{' || c == '[') - i32::from(c == '}' || c == ']');
        depth == 0
    });
    end.unwrap_or_else(|| panic!("a bracket is never closed: {text}"))
}

/// The parts between the `|` that stand outside of brackets.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut depth = 0;
    text.split(move |c| {
        depth += i32::from(c == '{' || c == '[') - i32::from(c == '}' || c == ']');
        depth == 0 && c == '|'
    })
}

/// Single spaces, paragraphs, and `an` before vowels.
fn tidy(text: &str) -> String {
    let paragraphs = text.split('¶').map(|paragraph| {
        let words: Vec<&str> = paragraph.split_whitespace().collect();
        let mut out = String::with_capacity(paragraph.len());
        for (i, &word) in words.iter().enumerate() {
            if i > 0 {
                out.push(' ');
            }
            out.push_str(word);
            let is_article = word.trim_start_matches('"').eq_ignore_ascii_case("a");
            if is_article && words.get(i + 1).is_some_and(|next| begins_with_vowel(next)) {
                out.push('n');
            }
        }
        out
    });
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

/// By sound, for the words of the grammar.
fn begins_with_vowel(word: &str) -> bool {
    let word = word.to_lowercase();
    match word.trim_end_matches(|c: char| !c.is_alphabetic()) {
        "hour" | "honest" => true,
        "one" | "once" | "useful" | "uniform" => false,
        _ => word.starts_with(['a', 'e', 'i', 'o', 'u']),
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    /// What `start` yields under a hundred seeds, each text once and sorted.
    fn all(source: &'static str) -> Vec<String> {
        let grammar = Grammar::parse(&[source]);
        let mut texts: Vec<_> =
            (0..100).map(|seed| grammar.write("start", &mut ChaCha8Rng::seed_from_u64(seed))).collect();
        texts.sort();
        texts.dedup();
        texts
    }

    #[test]
    fn alternatives_may_nest_and_be_empty() {
        assert_eq!(
            all("start\n  a [big|[very |]small] dog | no dog\n"),
            ["a big dog", "a small dog", "a very small dog", "no dog"]
        );
    }

    #[test]
    fn a_chosen_value_stays_and_is_never_chosen_again() {
        let source = "start\n  {x=pet}{y=pet}{x} and {y}, {x} and {y}\n\npet\n  cat | dog\n";
        assert_eq!(all(source), ["cat and dog, cat and dog", "dog and cat, dog and cat"]);
    }

    #[test]
    fn notes_give_pronouns_plurals_and_prepositions() {
        let source = "start\n  {x=who}{X} {where.at}: {x.he} and {x.his} {thing.s}\n\nwho\n  ann/f\n\nthing\n  mouse/mice\n\nwhere\n  the hill/on\n";
        assert_eq!(all(source), ["Ann on the hill: she and her mice"]);
    }

    #[test]
    fn a_becomes_an_by_sound() {
        assert_eq!(
            all("start\n  a apple, \"A old hat,\" a hour, a one, a cat\n"),
            ["an apple, \"An old hat,\" an hour, a one, a cat"]
        );
    }

    #[test]
    fn deeper_lines_continue_and_paragraphs_break() {
        assert_eq!(all("# comment\nstart\n  one\n    two¶three\n"), ["one two\n\nthree"]);
    }

    #[test]
    fn a_rule_never_gives_the_same_twice_in_a_row() {
        assert_eq!(all("start\n  {x}{x}{x}\n\nx\n  a | b\n"), ["aba", "bab"]);
    }
}
