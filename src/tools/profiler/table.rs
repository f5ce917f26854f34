//! A recording as a table: where the time of a step goes.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::Duration;

use super::{Category, Event};

/// Rows with a smaller share are summed up in one.
const SMALLEST_PCT: f64 = 0.1;

/// The time of the innermost spans by name and category, largest first; what lies in none of them comes last.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Row>,
    steps: usize,
    total: Duration,
}

#[derive(Debug)]
struct Row {
    name: String,
    category: Category,
    time: Duration,
    calls: usize,
}

impl Table {
    /// Of the steps in a recording, and the thread that took them.
    pub fn of(events: &[Event]) -> Self {
        let steps: Vec<&Event> = events.iter().filter(|event| event.category == Category::Step).collect();
        let within_a_step = |event: &Event| steps.iter().any(|step| step.thread == event.thread);
        let mut sums = BTreeMap::<(&str, Category), (Duration, usize)>::new();
        for event in events.iter().filter(|event| event.is_leaf && within_a_step(event)) {
            let (time, calls) = sums.entry((&event.name, event.category)).or_default();
            *time += event.duration;
            *calls += 1;
        }
        let row = |((name, category), (time, calls)): ((&str, _), _)| Row { name: name.into(), category, time, calls };
        let mut rows: Vec<Row> = sums.into_iter().map(row).collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.time));
        Self { rows, steps: steps.len(), total: steps.iter().map(|step| step.duration).sum() }
    }

    /// The share of the steps' time that lies in named innermost spans, from 0 to 100.
    pub fn accounted_pct(&self) -> f64 {
        self.pct(self.rows.iter().map(|row| row.time).sum())
    }

    fn pct(&self, time: Duration) -> f64 {
        100.0 * time.as_secs_f64() / self.total.as_secs_f64()
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| 1e3 * time.as_secs_f64() / self.steps as f64;
        match self.steps {
            1 => write!(f, "Where the {:.1} ms of a step went:", ms(self.total))?,
            n => write!(f, "Where the {:.1} ms of a step went, mean of {n}:", ms(self.total))?,
        }
        write!(f, "\n  {:<20} {:<16} {:>10} {:>7} {:>7}", "op", "in", "ms", "%", "calls")?;
        let mut line = |name: &str, category: &str, time, calls: &str| {
            write!(f, "\n  {name:<20} {category:<16} {:>10.2} {:>7.1} {calls:>7}", ms(time), self.pct(time))
        };
        let (large, small): (Vec<_>, Vec<_>) = self.rows.iter().partition(|row| self.pct(row.time) >= SMALLEST_PCT);
        for row in large {
            let calls = (10.0 * row.calls as f64 / self.steps as f64).round() / 10.0;
            line(&row.name, &row.category.to_string(), row.time, &calls.to_string())?;
        }
        if !small.is_empty() {
            line(&format!("{} others", small.len()), "", small.iter().map(|row| row.time).sum(), "")?;
        }
        let accounted = self.rows.iter().map(|row| row.time).sum();
        line("not accounted for", "", self.total.saturating_sub(accounted), "")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_table_means_over_steps_and_names_what_is_not_accounted_for() {
        let event = |name: &str, category, ms, thread, is_leaf| Event {
            name: name.into(),
            category,
            shapes: vec![],
            start: Instant::now(),
            duration: Duration::from_millis(ms),
            thread,
            is_leaf,
            memory: None,
        };
        let events = [
            event("linear", Category::Forward, 20, 0, true),
            event("linear", Category::Backward, 50, 0, true),
            event("layers.0", Category::Backward, 60, 0, false),
            event("step 1", Category::Step, 90, 0, false),
            event("linear", Category::Backward, 70, 0, true),
            event("elsewhere", Category::Data, 500, 1, true),
            event("step 2", Category::Step, 110, 0, false),
        ];
        let table = Table::of(&events);
        assert_eq!(table.accounted_pct(), 70.0);
        let lines: Vec<String> =
            table.to_string().lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            lines,
            [
                "Where the 100.0 ms of a step went, mean of 2:",
                "op in ms % calls",
                "linear backward 60.00 60.0 1",
                "linear forward 10.00 10.0 0.5",
                "not accounted for 30.00 30.0"
            ]
        );
    }
}
