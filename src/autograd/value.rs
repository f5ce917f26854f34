use std::cell::RefCell;
use std::rc::Rc;

use candle_core::Tensor;

use crate::Result;
use crate::ops;
use crate::tools::profiler::{self, Category};

/// One for each input of an op, `None` where one has none.
type Gradients = Vec<Option<Tensor>>;

/// From the gradient of an op's result.
enum Backward {
    /// To those of its inputs.
    Gradients(Box<dyn FnOnce(Tensor) -> Result<Gradients>>),
    /// The same, that of its first input added to what it has of other ops.
    Sum(Box<dyn FnOnce(Tensor, Option<Tensor>) -> Result<Gradients>>),
}

/// The ops of one stage in the order they ran. Node 0 is the stage's input.
#[derive(Default)]
struct Tape {
    nodes: RefCell<Vec<Node>>,
}

struct Node {
    op: &'static str,
    /// Where the gradient of each input goes: a node, or nowhere if that input is a constant.
    inputs: Vec<Option<usize>>,
    backward: Backward,
}

/// A tensor and, if a gradient is wanted through it, its place on a tape.
///
/// Without a tape ([`Value::constant`]) ops record nothing and save nothing: that is inference, and the forward pass
/// of a stage that will be recomputed.
#[derive(Clone)]
pub struct Value {
    tensor: Tensor,
    source: Option<(Rc<Tape>, usize)>,
}

impl Value {
    /// An activation through which no gradient flows.
    pub fn constant(tensor: Tensor) -> Self {
        Self { tensor, source: None }
    }

    /// The input of a stage, with a new tape behind it.
    pub fn input(tensor: Tensor) -> Self {
        let tape = Tape::default();
        tape.nodes.borrow_mut().push(Node {
            op: "input",
            inputs: vec![],
            backward: Backward::Gradients(Box::new(|_| Ok(vec![]))),
        });
        Self { tensor, source: Some((Rc::new(tape), 0)) }
    }

    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient will flow back through this value, so that an op must save what its backward needs.
    pub fn is_tracked(&self) -> bool {
        self.source.is_some()
    }

    /// The result of an op on `inputs`, with the op's backward: from the gradient of the result to one gradient per
    /// input, in the input's shape and dtype. `backward` is dropped unused if no input is tracked. `op` is the name that
    /// a profile knows the backward by.
    pub fn record<const N: usize>(
        op: &'static str,
        tensor: Tensor,
        inputs: [&Self; N],
        backward: impl FnOnce(Tensor) -> Result<[Option<Tensor>; N]> + 'static,
    ) -> Self {
        Self::node(op, tensor, &inputs, Backward::Gradients(Box::new(move |grad| Ok(backward(grad)?.into()))))
    }

    /// As [`record`](Self::record), of an op whose backward takes in, besides, what its first input has of other ops already,
    /// and returns the sum: where that is cheaper than to add afterwards.
    pub fn record_sum<const N: usize>(
        op: &'static str,
        tensor: Tensor,
        inputs: [&Self; N],
        backward: impl FnOnce(Tensor, Option<Tensor>) -> Result<[Option<Tensor>; N]> + 'static,
    ) -> Self {
        Self::node(op, tensor, &inputs, Backward::Sum(Box::new(move |grad, sum| Ok(backward(grad, sum)?.into()))))
    }

    fn node(op: &'static str, tensor: Tensor, inputs: &[&Self], backward: Backward) -> Self {
        let Some((tape, _)) = inputs.iter().find_map(|input| input.source.as_ref()) else {
            return Self::constant(tensor);
        };
        let inputs = inputs.iter().map(|input| input.source.as_ref().map(|(_, node)| *node)).collect();
        let mut nodes = tape.nodes.borrow_mut();
        nodes.push(Node { op, inputs, backward });
        Self { tensor, source: Some((tape.clone(), nodes.len() - 1)) }
    }

    /// `self` seen in another shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let _span = profiler::span("reshape").shapes(&[shape]);
        let original = self.tensor.shape().clone();
        let tensor = self.tensor.reshape(shape)?;
        Ok(Self::record("reshape", tensor, [self], move |grad| Ok([Some(grad.reshape(original)?)])))
    }

    /// The vector-Jacobian product of everything between this value and the tape's input: given the gradient of
    /// `self`, returns the gradient of the input. Parameter gradients are added to their accumulators on the way.
    /// Each op's saved tensors are freed as its backward ends. A tape can be walked once.
    pub fn backward(self, grad: Tensor) -> Result<Tensor> {
        let (tape, last) = self.source.expect("backward is called on values that have a tape");
        drop(self.tensor);
        let mut nodes = tape.nodes.take();
        nodes.truncate(last + 1);
        let mut grads: Vec<Option<Tensor>> = vec![None; nodes.len()];
        grads[last] = Some(grad);
        while let Some(node) = nodes.pop() {
            let index = nodes.len();
            if index == 0 {
                break;
            }
            let Some(grad) = grads.pop().expect("one gradient slot per node") else { continue };
            let span = profiler::span_in(Category::Backward, node.op).shapes(&[grad.dims()]);
            let input_grads = match node.backward {
                Backward::Gradients(backward) => span.around(|| backward(grad))?,
                Backward::Sum(backward) => {
                    let sum = node.inputs[0].and_then(|input| grads[input].take());
                    span.around(|| backward(grad, sum))?
                }
            };
            for (input, grad) in node.inputs.into_iter().zip(input_grads) {
                if let (Some(input), Some(grad)) = (input, grad) {
                    let sum = match grads[input].take() {
                        None => grad,
                        Some(sum) => ops::add_tensors(&sum, &grad)?,
                    };
                    grads[input] = Some(sum);
                }
            }
        }
        Ok(grads.swap_remove(0).expect("every op between a stage's input and its output passes a gradient on"))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// `y = a * x`, elementwise, with both as inputs.
    fn multiply(a: &Value, x: &Value) -> Result<Value> {
        let (ta, tx) = (a.tensor().clone(), x.tensor().clone());
        Ok(Value::record("multiply", (&ta * &tx)?, [a, x], move |grad| Ok([Some((&grad * tx)?), Some((&grad * ta)?)])))
    }

    #[test]
    fn a_value_used_twice_gets_the_sum_of_both_gradients() -> Result<()> {
        let x = Value::input(Tensor::new(&[2f32, 3.], &Device::Cpu)?);
        let cube = multiply(&multiply(&x, &x)?, &x)?;
        let grad = cube.backward(Tensor::new(&[1f32, 10.], &Device::Cpu)?)?;
        assert_eq!(grad.to_vec1::<f32>()?, [12., 270.]);
        Ok(())
    }

    #[test]
    fn an_op_that_sums_adds_to_what_its_input_has_already() -> Result<()> {
        let x = Value::input(Tensor::new(&[2f32, 3.], &Device::Cpu)?);
        let doubled = Value::record_sum("double", (x.tensor() * 2.0)?, [&x], |grad, sum| {
            let grad = (grad * 2.0)?;
            Ok([Some(sum.map_or(Ok(grad.clone()), |sum| sum + grad)?)])
        });
        // y = 2x · x · x, whose later factors give their gradients first.
        let y = multiply(&multiply(&doubled, &x)?, &x)?;
        let grad = y.backward(Tensor::new(&[1f32, 10.], &Device::Cpu)?)?;
        assert_eq!(grad.to_vec1::<f32>()?, [24., 540.]);
        Ok(())
    }

    #[test]
    fn nothing_is_recorded_without_a_tracked_input() -> Result<()> {
        let x = Value::constant(Tensor::new(&[2f32], &Device::Cpu)?);
        assert!(!multiply(&x, &x)?.is_tracked());
        Ok(())
    }

    #[test]
    fn a_constant_input_receives_no_gradient() -> Result<()> {
        let c = Value::constant(Tensor::new(&[5f32], &Device::Cpu)?);
        let x = Value::input(Tensor::new(&[2f32], &Device::Cpu)?);
        let grad = multiply(&c, &x)?.backward(Tensor::new(&[1f32], &Device::Cpu)?)?;
        assert_eq!(grad.to_vec1::<f32>()?, [5.]);
        Ok(())
    }
}
