//! Which part of a model left the finite numbers first.

use std::fmt;

use candle_core::Tensor;

use super::{MicroBatch, Out, Recompute, Stages, watched};
use crate::Result;
use crate::autograd::{Parameter, StageBuilder};
use crate::ops::magnitude;

/// What of a pass was the first that is not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    what: &'static str,
    stage: String,
    /// Whose weights, or whose gradients where these are at fault, are the first of the stage that are not finite; else
    /// the largest.
    parameter: Largest,
}

/// The parameter with the largest of some numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Largest {
    numbers: &'static str,
    fqn: String,
    magnitude: f32,
}

/// Repeats a pass, with its effects on gradients, and looks at all that comes out of the stages; `None`: all of it is
/// finite. `trained`: the stages with gradients.
pub fn diagnose<M: Stages>(
    model: &M,
    trained: &[StageBuilder],
    batch: &MicroBatch,
    scale: f64,
    recompute: Recompute,
) -> Result<Option<Fault>> {
    let mut fault = None;
    watched(model, batch, &super::context(model, batch)?, scale, recompute, &mut |stage, out| {
        if fault.is_none() {
            fault = look(model, trained, stage, out)?;
        }
        Ok(())
    })?;
    Ok(fault)
}

/// The parameter with the largest gradient.
pub fn largest_gradient(trained: &[StageBuilder]) -> Result<Option<Largest>> {
    first_or_largest("gradient", trained.iter(), Parameter::grad)
}

fn look<M: Stages>(model: &M, trained: &[StageBuilder], stage: usize, out: Out) -> Result<Option<Fault>> {
    let own = &model.stages()[stage];
    let (what, parameter) = match out {
        Out::Activations(x) if !magnitude(x)?.is_finite() => ("output", weights_of(model, trained, own)?),
        Out::Loss(loss) if !loss.to_scalar::<f32>()?.is_finite() => ("loss", weights_of(model, trained, own)?),
        Out::Gradients(dx) => {
            let largest = largest_gradient(trained)?;
            let is_bad = |largest: &Largest| !largest.magnitude.is_finite();
            match largest.filter(is_bad) {
                Some(largest) => ("gradient", Some(largest)),
                None if !magnitude(dx)?.is_finite() => ("gradient", weights_of(model, trained, own)?),
                None => return Ok(None),
            }
        }
        _ => return Ok(None),
    };
    Ok(parameter.map(|parameter| Fault { what, stage: own.name().to_owned(), parameter }))
}

/// Of the weights that a stage uses: its own, those of its adapters, and where these are all finite, one that another
/// stage shares with it.
fn weights_of<M: Stages>(model: &M, trained: &[StageBuilder], own: &StageBuilder) -> Result<Option<Largest>> {
    let all = || model.stages().iter().chain(trained);
    let used = first_or_largest("weight", all().filter(|stage| stage.name() == own.name()), Parameter::compute)?;
    if used.as_ref().is_some_and(|used| !used.magnitude.is_finite()) {
        return Ok(used);
    }
    let shared = first_or_largest("weight", all(), Parameter::compute)?.filter(|any| !any.magnitude.is_finite());
    Ok(shared.or(used))
}

/// The first parameter of which not all `numbers` are finite, else the one with the largest.
fn first_or_largest<'a>(
    numbers: &'static str,
    stages: impl Iterator<Item = &'a StageBuilder>,
    read: impl Fn(&Parameter) -> Result<Tensor>,
) -> Result<Option<Largest>> {
    let mut largest: Option<Largest> = None;
    for parameter in stages.flat_map(StageBuilder::parameters) {
        let magnitude = magnitude(&read(parameter)?)?;
        if !largest.as_ref().is_some_and(|largest| largest.magnitude >= magnitude) {
            largest = Some(Largest { numbers, fqn: parameter.fqn().to_owned(), magnitude });
        }
        if !magnitude.is_finite() {
            break;
        }
    }
    Ok(largest)
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, stage, parameter } = self;
        write!(f, "first to go bad is the {what} of `{stage}`: {parameter}")
    }
}

impl fmt::Display for Largest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { numbers, fqn, magnitude } = self;
        if magnitude.is_finite() {
            write!(f, "its {numbers}s are finite, the largest {magnitude:.1e} in `{fqn}`")
        } else {
            write!(f, "the {numbers} of `{fqn}` holds {magnitude}")
        }
    }
}
