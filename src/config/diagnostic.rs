//! Faults of a job config, and the report that shows them.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Group, Level, Origin as Place, Renderer, Snippet};

use crate::Error;

/// The text of a job config, under the name that messages give it.
pub(super) struct Document {
    pub name: String,
    pub text: String,
}

/// Where a value was set.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Origin {
    /// These bytes of the [`Document`].
    File(Range<usize>),
    /// This option of the command line.
    Flag(String),
}

/// The origin of every value that is not a default, by key path.
pub(super) type Origins = BTreeMap<String, Origin>;

/// One mistake: what, where, and what would work.
pub(super) struct Fault {
    title: String,
    /// The keys concerned; the first that was set tells the place, unless `origin` does.
    pub keys: Vec<String>,
    pub origin: Option<Origin>,
    /// A word or two beneath the place.
    hint: Option<String>,
    notes: Vec<String>,
}

impl Fault {
    pub fn new(title: impl Into<String>, keys: &[&str]) -> Self {
        let keys = keys.iter().map(|&key| key.to_owned()).collect();
        Self { title: title.into(), keys, origin: None, hint: None, notes: Vec::new() }
    }

    pub fn at(self, origin: Origin) -> Self {
        Self { origin: Some(origin), ..self }
    }

    pub fn hint(self, hint: impl Into<Option<String>>) -> Self {
        Self { hint: hint.into(), ..self }
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    fn origin<'a>(&'a self, origins: &'a Origins) -> Option<&'a Origin> {
        self.origin.as_ref().or_else(|| self.keys.iter().find_map(|key| origins.get(key)))
    }

    fn render(&self, document: Option<&Document>, origins: &Origins, renderer: &Renderer) -> String {
        let report = Level::ERROR.primary_title(&self.title);
        let hint = self.hint.as_deref();
        let (mut report, hint_as_note) = match (self.origin(origins), document) {
            (Some(Origin::File(span)), Some(document)) => {
                let place = AnnotationKind::Primary.span(span.clone()).label(hint);
                (report.element(Snippet::source(&document.text).path(&document.name).annotation(place)), None)
            }
            (Some(Origin::Flag(flag)), _) => (report.element(Place::path(format!("flag {flag}"))), hint),
            _ => (Group::with_title(report), hint),
        };
        for note in hint_as_note.into_iter().chain(self.notes.iter().map(String::as_str)) {
            report = report.element(Level::NOTE.no_name().message(note));
        }
        renderer.render(&[report])
    }
}

/// Faults that a report shows: each takes a look through the whole document, and nobody reads more.
const SHOWN: usize = 20;

/// All faults as one error, up to [`SHOWN`]: those of the document in its order, then those of flags, then those without
/// a place.
pub(super) fn report(mut faults: Vec<Fault>, document: Option<&Document>, origins: &Origins) -> Error {
    faults.sort_by_key(|fault| match fault.origin(origins) {
        Some(Origin::File(span)) => (0, span.start),
        Some(Origin::Flag(_)) => (1, 0),
        None => (2, 0),
    });
    let coloured = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let renderer = if coloured { Renderer::styled() } else { Renderer::plain() };
    let rendered = faults.iter().take(SHOWN).map(|fault| fault.render(document, origins, &renderer));
    let more = faults.len().checked_sub(SHOWN + 1).map(|more| format!("error: and {} more", more + 1));
    Error::Config(rendered.chain(more).collect::<Vec<_>>().join("\n\n"))
}

/// The candidate that `word` was probably meant to be: the nearest by edits, else one that contains it or is contained.
pub(super) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > 100 {
        return None; // no slip of the hand, and each distance takes its length
    }
    let word = word.to_lowercase().replace('-', "_");
    let candidates: Vec<_> = candidates.into_iter().map(|it| (it, it.to_lowercase().replace('-', "_"))).collect();
    let distance = |other: &str| strsim::damerau_levenshtein(&word, other);
    let by_edits = candidates.iter().map(|(name, it)| (distance(it), *name)).min();
    by_edits.filter(|(edits, _)| *edits <= (word.chars().count() / 3).max(1)).map(|(_, name)| name).or_else(|| {
        let long = |it: &str| it.len() >= 3;
        let related = |it: &str| long(&word) && long(it) && (it.contains(&*word) || word.contains(it));
        candidates.iter().filter(|(_, it)| related(it)).min_by_key(|(_, it)| distance(it)).map(|(name, _)| *name)
    })
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn nearest_mends_typos_and_completes_parts() {
        let keys = ["seq_len", "steps", "local_batch_size", "lr"];
        assert_eq!(nearest("seq_length", keys), Some("seq_len"));
        assert_eq!(nearest("stpes", keys), Some("steps"));
        assert_eq!(nearest("batch-size", keys), Some("local_batch_size"));
        assert_eq!(nearest("max_steps", keys), Some("steps"));
        assert_eq!(nearest("learning_rate", keys), None);
    }
}
