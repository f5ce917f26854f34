//! What is in the tensors of a checkpoint.

use std::ops::Range;
use std::path::Path;

use candle_core::DType;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use super::tensors::{TensorFiles, file_of, listed_files};
use crate::Result;

/// Elements that are read and looked at in one piece.
const PIECE: usize = 4 << 20;

pub struct TensorFacts {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// `None` for types that are no plain numbers: integers, and 8 bits with a scale elsewhere.
    pub statistics: Option<Statistics>,
}

/// Of the finite elements, in double precision. Minimum, maximum, mean and deviation of none are NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    pub min: f64,
    pub max: f64,
    pub mean: f64,
    /// From the mean.
    pub std: f64,
    /// Root of the mean square.
    pub rms: f64,
    pub n_nan: u64,
    pub n_infinite: u64,
}

/// The tensors of a `.safetensors` file, or of all of a folder, whose names contain `part`. Holds a piece of a tensor for
/// each processor, never a whole checkpoint.
pub fn inspect(path: &Path, part: &str) -> Result<Vec<TensorFacts>> {
    let files = match path.is_dir() {
        true => listed_files(path)?.iter().map(|name| file_of(path, name)).collect::<Result<_>>()?,
        false => vec![path.to_owned()],
    };
    let files = TensorFiles::open_files(path, files)?;
    let names: Vec<&str> = files.names().filter(|name| name.contains(part)).collect();
    names.par_iter().map(|name| facts(&files, name)).collect()
}

fn facts(files: &TensorFiles, name: &str) -> Result<TensorFacts> {
    let info = files.info(name).expect("it is one of their names");
    let is_plain = matches!(info.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let statistics = is_plain.then(|| statistics(files, name, info)).transpose()?;
    Ok(TensorFacts { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone(), statistics })
}

fn statistics(files: &TensorFiles, name: &str, info: &TensorInfo) -> Result<Statistics> {
    let mut sums = Sums::default();
    for rows in pieces(&info.shape) {
        let piece = files.read(name, rows)?.flatten_all()?.to_dtype(DType::F64)?;
        piece.to_vec1::<f64>()?.into_iter().for_each(|x| sums.add(x));
    }
    Ok(sums.statistics())
}

/// Rows of about [`PIECE`] elements; `None`: all that there is.
fn pieces(shape: &[usize]) -> Vec<Option<Range<usize>>> {
    let [rows, row @ ..] = shape else { return vec![None] };
    let n = (PIECE / row.iter().product::<usize>().max(1)).max(1);
    (0..*rows).step_by(n).map(|start| Some(start..(start + n).min(*rows))).collect()
}

/// Welford's running mean and sum of squared deviations, which large means do not cancel.
struct Sums {
    n: f64,
    min: f64,
    max: f64,
    mean: f64,
    squares: f64,
    n_nan: u64,
    n_infinite: u64,
}

impl Default for Sums {
    fn default() -> Self {
        Self { n: 0.0, min: f64::NAN, max: f64::NAN, mean: 0.0, squares: 0.0, n_nan: 0, n_infinite: 0 }
    }
}

impl Sums {
    fn add(&mut self, x: f64) {
        if !x.is_finite() {
            *if x.is_nan() { &mut self.n_nan } else { &mut self.n_infinite } += 1;
            return;
        }
        self.n += 1.0;
        self.min = self.min.min(x);
        self.max = self.max.max(x);
        let deviation = x - self.mean;
        self.mean += deviation / self.n;
        self.squares += deviation * (x - self.mean);
    }

    fn statistics(self) -> Statistics {
        let variance = self.squares / self.n;
        let mean = if self.n > 0.0 { self.mean } else { f64::NAN };
        Statistics {
            min: self.min,
            max: self.max,
            mean,
            std: variance.sqrt(),
            rms: (variance + mean * mean).sqrt(),
            n_nan: self.n_nan,
            n_infinite: self.n_infinite,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(elements: &[f64]) -> Statistics {
        let mut sums = Sums::default();
        elements.iter().for_each(|&x| sums.add(x));
        sums.statistics()
    }

    #[test]
    fn what_is_not_finite_is_counted_and_left_out() {
        let found = of(&[1.0, f64::NAN, 3.0, f64::INFINITY, f64::NEG_INFINITY]);
        let rms = 5f64.sqrt();
        assert_eq!(found, Statistics { min: 1.0, max: 3.0, mean: 2.0, std: 1.0, rms, n_nan: 1, n_infinite: 2 });
        let found = of(&[f64::NAN]);
        assert!(found.mean.is_nan() && found.min.is_nan() && found.std.is_nan() && found.n_nan == 1);
    }

    #[test]
    fn a_small_deviation_from_a_large_mean_is_seen() {
        let found = of(&[1e9 + 1.0, 1e9 - 1.0]);
        assert_eq!((found.mean, found.std), (1e9, 1.0));
    }

    #[test]
    fn pieces_cover_all_rows_once() {
        let rows = |shape: &[usize]| pieces(shape).into_iter().map(Option::unwrap).collect::<Vec<_>>();
        assert_eq!(rows(&[5, PIECE / 2]), [0..2, 2..4, 4..5]);
        assert_eq!(rows(&[2, 2 * PIECE]), [0..1, 1..2], "a row is not divided");
        assert_eq!(pieces(&[3]), [Some(0..3)]);
        assert_eq!(pieces(&[]), [None]);
        assert_eq!(pieces(&[0, 4]), []);
    }
}
