//! Log lines on standard error: the time, the level where it is not INFO, the message.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use anstyle::{AnsiColor, Style};
use indicatif::MultiProgress;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::{Error, Result};

/// The variable that says what is logged: a level for titan (`debug`), or `module=level` pairs.
const VARIABLE: &str = "TITAN_LOG";

static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Starts logging. A second call changes nothing.
///
/// # Errors
/// [`Error::Usage`] if `TITAN_LOG` cannot be understood.
pub fn init() -> Result<()> {
    let wanted = std::env::var(VARIABLE).unwrap_or_default();
    let already_started = tracing_subscriber::fmt()
        .with_env_filter(filter(&wanted)?)
        .with_writer(|| AroundBars)
        .with_ansi(colors())
        // The metrics line brings its own colours.
        .with_ansi_sanitization(false)
        // Complaints about a closed standard error would go to standard error, and panic.
        .log_internal_errors(false)
        .event_format(Line)
        .finish()
        .try_init();
    drop(already_started);
    Ok(())
}

/// Every progress bar is added here, so that log lines are printed above it.
/// Bars draw on standard error, and only where it is a terminal.
pub fn bars() -> &'static MultiProgress {
    &BARS
}

/// Whether standard error shows colours: a terminal, and `NO_COLOR` not set.
pub fn colors() -> bool {
    io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Dependencies speak from WARN on, titan from INFO on, unless `wanted` says otherwise.
fn filter(wanted: &str) -> Result<EnvFilter> {
    let refuse = |found: &str| {
        Error::Usage(format!(
            "{VARIABLE}: cannot understand \"{found}\"\n   = a level (off, error, warn, info, debug, trace), or \
             module=level pairs separated by commas: titan::data=debug,hf_hub=info"
        ))
    };
    // What goes wrong at the hub, titan says itself.
    let mut directives = "warn,hf_hub=off,titan=info".to_owned();
    for word in wanted.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        if word.contains('=') {
            directives += &format!(",{word}");
        } else {
            let level: LevelFilter = word.parse().map_err(|_| refuse(word))?;
            directives += &format!(",titan={level}");
        }
    }
    EnvFilter::builder().parse(directives).map_err(|_| refuse(wanted))
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = *event.metadata().level();
        let (time_style, level_style) =
            if writer.has_ansi_escapes() { (Style::new().dimmed(), level_style(level)) } else { Default::default() };

        write!(writer, "{time_style}{}{time_style:#} ", chrono::Local::now().format("%H:%M:%S"))?;
        if level != Level::INFO {
            write!(writer, "{level_style}{level}{level_style:#} ")?;
        }
        ctx.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

fn level_style(level: Level) -> Style {
    match level {
        Level::ERROR => AnsiColor::Red.on_default().bold(),
        Level::WARN => AnsiColor::Yellow.on_default(),
        _ => Style::new().dimmed(),
    }
}

/// Standard error, with the progress bars out of the way while a line is written.
struct AroundBars;

impl Write for AroundBars {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What `emit` logs under `TITAN_LOG = wanted`, without the times.
    fn logged(wanted: &str, emit: impl FnOnce()) -> Vec<String> {
        #[derive(Clone, Default)]
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter(wanted).unwrap())
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .event_format(Line)
            .finish();
        tracing::subscriber::with_default(subscriber, emit);
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| line["20:30:00 ".len()..].to_owned()).collect()
    }

    fn one_of_each() {
        tracing::debug!("small");
        tracing::info!("step: {}", 1);
        tracing::warn!("odd");
        tracing::info!(target: "some_crate::client", "chatter");
        tracing::warn!(target: "some_crate::client", "trouble");
    }

    #[test]
    fn a_line_names_its_level_only_where_it_is_not_info() {
        assert_eq!(logged("", one_of_each), ["step: 1", "WARN odd", "WARN trouble"]);
    }

    #[test]
    fn a_bare_level_is_titans_own_and_leaves_dependencies_quiet() {
        assert_eq!(logged("debug", one_of_each), ["DEBUG small", "step: 1", "WARN odd", "WARN trouble"]);
    }

    #[test]
    fn module_levels_are_added_to_the_defaults() {
        assert_eq!(logged("titan=warn, some_crate=info", one_of_each), ["WARN odd", "chatter", "WARN trouble"]);
    }

    #[test]
    fn a_misspelt_level_is_refused_with_the_levels_there_are() {
        let message = filter("debgu").unwrap_err().to_string();
        assert!(message.contains("TITAN_LOG") && message.contains("debgu") && message.contains("trace"), "{message}");
        assert!(filter("titan=lots").is_err());
    }
}
