//! A recording as a table: what holds memory when most of it is held.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::{self, Display};

use super::{Category, Event, Memory};

/// Rows with a smaller share are summed up in one.
const SMALLEST_PCT: f64 = 0.5;
/// The share of what a stage's ops keep that may be given back between them, for them to be named.
const UNKNOWN: f64 = 0.5;

/// Who holds how much at the peak of a step, largest first: what there was before, and what the step's innermost spans
/// have taken and not given back by then.
#[derive(Debug)]
pub struct MemoryTable {
    step: String,
    /// The span in which the peak is.
    at: (String, Category),
    peak: f64,
    rows: Vec<(String, String, f64)>,
}

impl MemoryTable {
    /// Of the last step in a recording that watched memory; `before`: names and bytes of what is known to be held all the
    /// time. `None` if there is no such step.
    pub fn of(events: &[Event], before: &[(&str, f64)]) -> Option<Self> {
        let (step, of_step) = watched(events.iter().rfind(|event| event.category == Category::Step)?)?;
        let inside = |it: &&Event| it.thread == step.thread && it.start >= step.start && it.category != Category::Step;
        let mut inner: Vec<Watched> = events.iter().filter(inside).filter_map(watched).collect();
        inner.sort_by_key(|(event, _)| (event.start, Reverse(event.duration)));
        // The first, if the peak comes more than once.
        let (at, of_peak) = *inner.iter().rev().filter(|it| it.0.is_leaf).max_by_key(|it| it.1.peak)?;

        let mut sums = BTreeMap::<(&str, Category), f64>::new();
        let mut rest = &inner[..inner.partition_point(|(event, _)| event.start < at.start)];
        // A stage's span and those inside it, at a time.
        while let [(stage, of_stage), ..] = rest {
            let end = stage.start + stage.duration;
            let (own, behind) = rest.split_at(rest.partition_point(|(event, _)| event.start < end));
            let leaves = || own.iter().filter(|(event, _)| event.is_leaf);
            let kept: f64 = leaves().map(|it| it.1.growth()).sum();
            let is_over = end <= at.start;
            // Where a stage has given back what its ops had kept, whose that was is not known.
            if is_over && (kept - of_stage.growth()).abs() > UNKNOWN * kept.abs() {
                let name = stage.name.split('.').next().unwrap_or_default();
                *sums.entry((name, stage.category)).or_default() += of_stage.growth();
            } else {
                leaves().for_each(|(op, of_op)| *sums.entry((&op.name, op.category)).or_default() += of_op.growth());
            }
            rest = behind;
        }

        let row = |name: &str, place: &dyn Display, bytes| (name.to_owned(), place.to_string(), bytes);
        let mut rows: Vec<_> = sums.iter().map(|((name, category), bytes)| row(name, category, *bytes)).collect();
        rows.extend(before.iter().map(|(name, bytes)| row(name, &"", *bytes)));
        let named: f64 = before.iter().map(|(_, bytes)| bytes).sum();
        rows.push(row("others", &"before the step", of_step.before as f64 - named));
        rows.push(row(&at.name, &"while it runs", (of_peak.peak - of_peak.before) as f64));
        let between = of_peak.before as f64 - of_step.before as f64 - sums.values().sum::<f64>();
        rows.push(row("other changes", &"between ops", between));
        rows.sort_by(|a, b| b.2.total_cmp(&a.2));
        Some(Self { step: step.name.clone(), at: (at.name.clone(), at.category), peak: of_peak.peak as f64, rows })
    }
}

type Watched<'a> = (&'a Event, Memory);

fn watched(event: &Event) -> Option<Watched<'_>> {
    Some((event, event.memory?))
}

impl Display for MemoryTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mib, pct) = (|bytes: f64| bytes / f64::from(1 << 20), |bytes: f64| 100.0 * bytes / self.peak);
        let (name, category) = &self.at;
        write!(f, "What holds the {:.1} MiB at the peak of {}, in {name} ({category}):", mib(self.peak), self.step)?;
        write!(f, "\n  {:<20} {:<16} {:>10} {:>7}", "held by", "in", "MiB", "%")?;
        let mut line = |name: &str, place: &str, bytes| {
            write!(f, "\n  {name:<20} {place:<16} {:>10.1} {:>7.1}", mib(bytes), pct(bytes))
        };
        let (large, small): (Vec<_>, Vec<_>) = self.rows.iter().partition(|row| pct(row.2).abs() >= SMALLEST_PCT);
        for (name, place, bytes) in large {
            line(name, place, *bytes)?;
        }
        if !small.is_empty() {
            line(&format!("{} others", small.len()), "", small.iter().map(|row| row.2).sum())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_table_accounts_for_all_that_is_held_at_the_peak() {
        let (origin, mib) = (Instant::now(), |n: u64| n << 20);
        let event = |name: &str, category, (from, to): (u64, u64), before, after, peak| Event {
            name: name.into(),
            category,
            shapes: vec![],
            start: origin + Duration::from_millis(from),
            duration: Duration::from_millis(to - from),
            thread: 0,
            is_leaf: category != Category::Step && !name.contains('.'),
            memory: Some(Memory { before: mib(before), after: mib(after), peak: mib(peak) }),
        };
        use Category::{Backward, Forward, ForwardBackward, Step};
        // In the order of their ends; the step before is of no concern.
        let events = [
            event("linear", Forward, (1, 2), 100, 900, 990),
            event("step 1", Step, (0, 9), 100, 100, 990),
            event("linear", Forward, (12, 13), 101, 121, 130),
            event("glu", Forward, (13, 14), 121, 131, 131),
            event("layers.0", Forward, (11, 15), 101, 131, 131),
            event("linear", Forward, (17, 18), 131, 141, 150),
            event("glu", Forward, (18, 19), 141, 151, 151),
            event("layers.1", Forward, (16, 20), 131, 136, 151), // which keeps no more than its input
            event("linear", Forward, (22, 23), 136, 143, 150),
            event("head", ForwardBackward, (23, 24), 145, 142, 200),
            event("stage.head", ForwardBackward, (21, 25), 136, 142, 200),
            event("linear", Backward, (25, 26), 142, 112, 200),
            event("step 2", Step, (10, 30), 100, 100, 200),
        ];
        let table = MemoryTable::of(&events, &[("weights", 60.0 * f64::from(1 << 20))]).unwrap();
        let lines: Vec<String> =
            table.to_string().lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "What holds the 200.0 MiB at the peak of step 2, in head (forward,backward):",
                "held by in MiB %",
                "weights 60.0 30.0",
                "head while it runs 55.0 27.5",
                "others before the step 40.0 20.0",
                "linear forward 27.0 13.5",
                "glu forward 10.0 5.0",
                "layers forward 5.0 2.5",
                "other changes between ops 3.0 1.5",
            ]
        );
        assert!(MemoryTable::of(&events[..1], &[]).is_none(), "no step");
    }
}
