//! How the tensors of a Hugging Face checkpoint are made of titan's parameters, some rows at a time.
//!
//! A row is everything under one index of the first dimension. Every layout keeps rows, or small groups of them,
//! together, so that tensors larger than memory can be converted piece by piece.

use std::ops::Range;

use candle_core::Tensor;

use crate::Result;

/// Reads rows of a parameter by its name.
pub type ReadRows<'a> = dyn Fn(&str, Range<usize>) -> Result<Tensor> + 'a;

/// Reads rows of a file's tensor by its name, all of them for `None`.
pub type ReadFile<'a> = dyn Fn(&str, Option<Range<usize>>) -> Result<Tensor> + 'a;

/// Some tensors of a file, and the parameters of titan that they hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The tensors' names in the file: one, or for [`Layout::Experts`] one per expert.
    pub files: Vec<String>,
    /// Names of the parameters: one, or `w1` and `w3` where the layout says so.
    pub parameters: Vec<String>,
    pub layout: Layout,
}

/// How a file's tensor is laid out, seen from titan's parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// As titan has it.
    Same,
    /// Rows of each head sorted by half of the rotary pair instead of by pair.
    RotaryHalves { head_dim: usize },
    /// `(e, out, in)` as `e` tensors `(out, in)`.
    Experts,
    /// `(e, out, in)` as `(e, in, out)`.
    Transposed,
    /// `w1` and `w3`, both `(e, h, d)`, as `(e, d, 2 * h)`.
    GateUpTransposed,
    /// `w1` and `w3`, both `(e, h, d)`, as `(e, 2 * h, d)`.
    GateUp,
    /// `w1` and `w3`, both `(e, h, d)`, as `(e, d, 2 * h)` with rows of `w1` and `w3` in turn; biases `(e, h)` as
    /// `(e, 2 * h)`.
    GateUpInterleaved,
}

impl Mapping {
    pub fn same(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { files: vec![name.clone()], parameters: vec![name], layout: Layout::Same }
    }

    /// The shape of each file tensor, from that of its (first) parameter.
    pub fn file_shape(&self, parameter: &[usize]) -> Vec<usize> {
        match (self.layout, parameter) {
            (Layout::Experts, [_, expert @ ..]) => expert.to_vec(),
            (Layout::Transposed, &[e, out, input]) => vec![e, input, out],
            (Layout::GateUpTransposed | Layout::GateUpInterleaved, &[e, h, d]) => vec![e, d, 2 * h],
            (Layout::GateUpInterleaved, &[e, h]) => vec![e, 2 * h],
            (Layout::GateUp, &[e, h, d]) => vec![e, 2 * h, d],
            _ => parameter.to_vec(),
        }
    }

    /// Ranges of rows that are asked for must begin and end at multiples of this.
    pub fn rows_together(&self) -> usize {
        match self.layout {
            Layout::RotaryHalves { head_dim } => head_dim,
            _ => 1,
        }
    }

    /// Rows of the file's tensor `which`.
    pub fn file_rows(&self, which: usize, rows: Range<usize>, parameters: &ReadRows) -> Result<Tensor> {
        if self.layout == Layout::Experts {
            let expert = parameters(&self.parameters[0], which..which + 1)?;
            return Ok(expert.squeeze(0)?.narrow(0, rows.start, rows.len())?);
        }
        let read = |name: &String| parameters(name, rows.clone());
        let first = read(&self.parameters[0])?;
        Ok(match self.layout {
            Layout::Same | Layout::Experts => first,
            Layout::RotaryHalves { head_dim } => swap_within_heads(&first, head_dim, head_dim / 2, 2)?,
            Layout::Transposed => first.transpose(1, 2)?.contiguous()?,
            Layout::GateUp => Tensor::cat(&[first, read(&self.parameters[1])?], 1)?,
            Layout::GateUpTransposed => {
                Tensor::cat(&[first, read(&self.parameters[1])?], 1)?.transpose(1, 2)?.contiguous()?
            }
            Layout::GateUpInterleaved => {
                let in_turn = Tensor::stack(&[first, read(&self.parameters[1])?], 2)?.flatten(1, 2)?;
                transposed(&in_turn)?
            }
        })
    }

    /// What the files hold of rows of the parameters.
    pub fn stored_rows(&self, rows: Range<usize>, files: &ReadFile) -> Result<Tensor> {
        if self.layout == Layout::Experts {
            let experts = self.files[rows].iter().map(|name| files(name, None)).collect::<Result<Vec<_>>>()?;
            return Ok(Tensor::stack(&experts, 0)?);
        }
        files(&self.files[0], Some(rows))
    }

    /// The part of parameter `which` in [`Mapping::stored_rows`].
    pub fn parameter_of(&self, which: usize, stored: &Tensor) -> Result<Tensor> {
        let half = |dim: usize| -> Result<Tensor> {
            let h = stored.dim(dim)? / 2;
            Ok(stored.narrow(dim, which * h, h)?)
        };
        Ok(match self.layout {
            Layout::Same | Layout::Experts => stored.clone(),
            Layout::RotaryHalves { head_dim } => swap_within_heads(stored, head_dim, 2, head_dim / 2)?,
            Layout::Transposed => stored.transpose(1, 2)?.contiguous()?,
            Layout::GateUp => half(1)?.contiguous()?,
            Layout::GateUpTransposed => half(2)?.transpose(1, 2)?.contiguous()?,
            Layout::GateUpInterleaved => {
                let in_turn = transposed(stored)?;
                let h = in_turn.dim(1)? / 2;
                let shape = [&[in_turn.dim(0)?, h, 2], &in_turn.dims()[2..]].concat();
                in_turn.reshape(shape)?.narrow(2, which, 1)?.squeeze(2)?.contiguous()?
            }
        })
    }
}

/// `(e, a, b)` as `(e, b, a)`; biases `(e, a)` as they are.
fn transposed(experts: &Tensor) -> Result<Tensor> {
    Ok(if experts.rank() == 3 { experts.transpose(1, 2)?.contiguous()? } else { experts.clone() })
}

/// Reorders the rows of each head from `(a, b)` to `(b, a)`.
fn swap_within_heads(weight: &Tensor, head_dim: usize, a: usize, b: usize) -> Result<Tensor> {
    let shape = weight.dims().to_vec();
    let heads = weight.reshape((shape[0] / head_dim, a, b, ()))?;
    Ok(heads.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::Device;

    use super::*;

    fn numbers(shape: &[usize], from: u32) -> Tensor {
        let n = shape.iter().product::<usize>() as u32;
        Tensor::arange(from, from + n, &Device::Cpu).unwrap().reshape(shape).unwrap()
    }

    fn mapping(layout: Layout, files: &[&str], parameters: &[&str]) -> Mapping {
        let owned = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
        Mapping { files: owned(files), parameters: owned(parameters), layout }
    }

    fn reader(tensors: &HashMap<String, Tensor>) -> impl Fn(&str, Option<Range<usize>>) -> Result<Tensor> {
        |name, rows| {
            let tensor = &tensors[name];
            Ok(match rows {
                Some(rows) => tensor.narrow(0, rows.start, rows.len())?,
                None => tensor.clone(),
            })
        }
    }

    /// Converts piece by piece and back, and gives the files' tensors.
    fn there_and_back(mapping: &Mapping, parameters: &[Tensor]) -> Vec<Tensor> {
        let pieces = |n: usize| (0..n).step_by(mapping.rows_together()).map(|row| row..row + mapping.rows_together());
        let named: HashMap<_, _> = mapping.parameters.iter().cloned().zip(parameters.iter().cloned()).collect();
        let shape = mapping.file_shape(parameters[0].dims());
        let file = |which| {
            let rows = pieces(shape[0])
                .map(|rows| mapping.file_rows(which, rows, &|name, rows| reader(&named)(name, Some(rows))).unwrap());
            Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap()
        };
        let files: Vec<Tensor> = (0..mapping.files.len()).map(file).collect();
        let stored: HashMap<_, _> = mapping.files.iter().cloned().zip(files.iter().cloned()).collect();
        for (which, parameter) in parameters.iter().enumerate() {
            for rows in pieces(parameter.dims()[0]) {
                let held = mapping.stored_rows(rows.clone(), &reader(&stored)).unwrap();
                let back = mapping.parameter_of(which, &held).unwrap();
                assert_eq!(flat(&back), flat(&parameter.narrow(0, rows.start, rows.len()).unwrap()), "{mapping:?}");
            }
        }
        for file in &files {
            assert_eq!(file.dims(), shape);
        }
        files
    }

    fn flat(tensor: &Tensor) -> Vec<u32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn row_j_of_pair_i_goes_to_j_halves_plus_i() {
        // Two heads of 4 rows: pairs (0, 1) and (2, 3).
        let q = mapping(Layout::RotaryHalves { head_dim: 4 }, &["q"], &["wq"]);
        let stored = there_and_back(&q, &[numbers(&[8, 1], 0)]);
        assert_eq!(flat(&stored[0]), [0, 2, 1, 3, 4, 6, 5, 7]);
    }

    #[test]
    fn gate_and_up_lie_side_by_side() {
        let (w1, w3) = (numbers(&[2, 2, 3], 0), numbers(&[2, 2, 3], 100));
        let gate_up = mapping(Layout::GateUpTransposed, &["x"], &["w1", "w3"]);
        let stored = there_and_back(&gate_up, &[w1.clone(), w3.clone()]);
        assert_eq!(stored[0].to_vec3::<u32>().unwrap()[0], [[0, 3, 100, 103], [1, 4, 101, 104], [2, 5, 102, 105]]);
        let gate_up = mapping(Layout::GateUp, &["x"], &["w1", "w3"]);
        let stored = there_and_back(&gate_up, &[w1, w3]);
        assert_eq!(stored[0].to_vec3::<u32>().unwrap()[1], [[6, 7, 8], [9, 10, 11], [106, 107, 108], [109, 110, 111]]);
    }

    #[test]
    fn gate_and_up_may_take_turns() {
        let (w1, w3) = (numbers(&[2, 2, 3], 0), numbers(&[2, 2, 3], 100));
        let gate_up = mapping(Layout::GateUpInterleaved, &["x"], &["w1", "w3"]);
        let stored = there_and_back(&gate_up, &[w1, w3]);
        assert_eq!(stored[0].to_vec3::<u32>().unwrap()[0], [[0, 100, 3, 103], [1, 101, 4, 104], [2, 102, 5, 105]]);
        let stored = there_and_back(&gate_up, &[numbers(&[2, 2], 0), numbers(&[2, 2], 10)]);
        assert_eq!(stored[0].to_vec2::<u32>().unwrap(), [[0, 10, 1, 11], [2, 12, 3, 13]]);
    }

    #[test]
    fn each_expert_has_a_tensor_of_its_own() {
        let experts = mapping(Layout::Experts, &["x.0", "x.1"], &["w2"]);
        let stored = there_and_back(&experts, &[numbers(&[2, 2, 3], 0)]);
        assert_eq!(stored[1].to_vec2::<u32>().unwrap(), [[6, 7, 8], [9, 10, 11]]);
    }

    #[test]
    fn down_projections_are_transposed_expert_by_expert() {
        let down = mapping(Layout::Transposed, &["x"], &["w2"]);
        let stored = there_and_back(&down, &[numbers(&[2, 2, 3], 0)]);
        assert_eq!(stored[0].to_vec3::<u32>().unwrap()[1], [[6, 9], [7, 10], [8, 11]]);
    }
}
