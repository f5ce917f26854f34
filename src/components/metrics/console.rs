//! The lines that a run prints, in the form that TorchTitan's users and their scripts read.

use anstyle::{AnsiColor, Reset, RgbColor, Style};

use super::{StepMetrics, ValidationMetrics};
use crate::tools::device::GIB;

/// `step: 10  loss:  6.9078  grad_norm:  1.2500  memory:  0.51GiB(6.43%)  tps: 12,345  tflops: 0.93  mfu: 41.20%`
pub fn step_line(metrics: &StepMetrics, colors: bool) -> String {
    let memory_gib = metrics.peak_reserved_bytes as f64 / GIB;
    paint(
        colors,
        &[
            (RED, format!("step: {:2}  ", metrics.step)),
            (GREEN, format!("loss: {}  ", fixed(metrics.loss.into(), 7, 4))),
            (ORANGE, format!("grad_norm: {}  ", fixed(metrics.grad_norm.into(), 7, 4))),
            (TURQUOISE, format!("memory: {memory_gib:5.2}GiB({:.2}%)  ", metrics.peak_reserved_pct)),
            (BLUE, format!("tps: {}  ", grouped(metrics.tps, 0))),
            (CYAN, format!("tflops: {}  ", grouped(metrics.tflops, 2))),
            (MAGENTA, format!("mfu: {:.2}%", metrics.mfu_pct)),
        ],
    )
}

/// `validate step: 10  loss:  6.9078  memory:  0.51GiB(6.43%)  tps: 12,345`
pub fn validation_line(metrics: &ValidationMetrics, colors: bool) -> String {
    let memory_gib = metrics.peak_reserved_bytes as f64 / GIB;
    paint(
        colors,
        &[
            (YELLOW, format!("validate step: {:2}  ", metrics.step)),
            (GREEN, format!("loss: {}  ", fixed(metrics.validation_loss.into(), 7, 4))),
            (TURQUOISE, format!("memory: {memory_gib:5.2}GiB({:.2}%)  ", metrics.peak_reserved_pct)),
            (BLUE, format!("tps: {}", grouped(metrics.validation_tps, 0))),
        ],
    )
}

const RED: Style = AnsiColor::Red.on_default();
const GREEN: Style = AnsiColor::Green.on_default();
const YELLOW: Style = AnsiColor::Yellow.on_default();
const BLUE: Style = AnsiColor::Blue.on_default();
const MAGENTA: Style = AnsiColor::Magenta.on_default();
const CYAN: Style = AnsiColor::Cyan.on_default();
const ORANGE: Style = RgbColor(180, 60, 0).on_default();
const TURQUOISE: Style = RgbColor(54, 234, 195).on_default();

fn paint(colors: bool, parts: &[(Style, String)]) -> String {
    if colors {
        parts
            .iter()
            .map(|(style, text)| format!("{}{text}", style.render()))
            .chain([Reset.render().to_string()])
            .collect()
    } else {
        parts.iter().map(|(_, text)| text.as_str()).collect()
    }
}

/// `{value:width.decimals f}` of Python, which writes `nan` where Rust writes `NaN`.
fn fixed(value: f64, width: usize, decimals: usize) -> String {
    format!("{value:width$.decimals$}").replace("NaN", "nan")
}

/// With commas between thousands: `1,234.50`.
pub fn grouped(value: f64, decimals: usize) -> String {
    let text = fixed(value, 0, decimals);
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let n_digits = whole.len();
    let mut line = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (n_digits - i).is_multiple_of(3) && value.is_finite() {
            line.push(',');
        }
        line.push(digit);
    }
    line + fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::components::metrics::tests::{step_metrics, validation_metrics};

    #[test]
    fn a_step_line_is_torchtitans_to_the_letter() {
        assert_eq!(
            step_line(&step_metrics(), false),
            "step:  1  loss:  8.1376  grad_norm:  1.4021  memory:  1.50GiB(18.75%)  tps: 1,234,568  \
             tflops: 1,092.83  mfu: 43.66%"
        );
        let later = StepMetrics { step: 12_345, loss: 12.5, grad_norm: 123.456, ..step_metrics() };
        assert!(step_line(&later, false).starts_with("step: 12345  loss: 12.5000  grad_norm: 123.4560  memory: "));
    }

    #[test]
    fn a_validation_line_is_torchtitans_to_the_letter() {
        assert_eq!(
            validation_line(&validation_metrics(), false),
            "validate step: 20  loss:  3.2500  memory:  1.50GiB(18.75%)  tps: 999"
        );
    }

    #[test]
    fn colours_wrap_the_same_text_and_end_with_it() {
        let painted = step_line(&step_metrics(), true);
        assert!(painted.starts_with("\x1b[31mstep:  1  \x1b[32mloss:  8.1376  \x1b[38;2;180;60;0mgrad_norm: "));
        assert!(painted.ends_with("\x1b[35mmfu: 43.66%\x1b[0m"));
    }

    #[test]
    fn thousands_are_grouped_as_python_groups_them() {
        let cases = [
            (0.0, 0, "0"),
            (999.5, 0, "1,000"),
            (12_345.0, 0, "12,345"),
            (0.005, 2, "0.01"),
            (1234.5, 2, "1,234.50"),
            (1e9, 0, "1,000,000,000"),
            (f64::NAN, 2, "nan"),
            (f64::INFINITY, 0, "inf"),
        ];
        for (value, decimals, expected) in cases {
            assert_eq!(grouped(value, decimals), expected);
        }
    }

    #[test]
    fn a_loss_that_is_not_a_number_reads_nan() {
        let broken = StepMetrics { loss: f32::NAN, ..step_metrics() };
        assert!(step_line(&broken, false).starts_with("step:  1  loss:     nan  grad_norm: "));
    }
}
