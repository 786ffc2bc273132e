//! The kernels as candle operations with gradients, and the same in plain candle operations.
//!
//! The kernels know the CPU; on another device the plain forms run. Candle's own `softmax_last_dim`, `rms_norm` and
//! `rope` are avoided everywhere: they silently give no gradient (candle issues 2168, 3568, 3752).

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, Device, Layout, Result, Shape, Storage, Tensor};
use proto::{ActionMask, Token};

use crate::kernels::{
    AttentionShape, MatrixView, PackedMatrix, RotaryTable, attention_backward, attention_forward, matmul, rms_norm,
    rms_norm_backward, swiglu, swiglu_backward,
};
use crate::sampler::{masked_logprob, masked_logprob_backward};

/// The operations of the network, fused or plain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ops {
    /// Whether the kernels run; they know the CPU only.
    pub(crate) fused: bool,
}

impl Ops {
    /// Multiplies `x [N, K]` by `weight [K, L]`.
    pub(crate) fn linear(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if self.fused { x.apply_op2(weight, Linear) } else { x.matmul(weight) }
    }

    /// Normalises rows of `x [N, D]` and scales them by `weight [D]`.
    pub(crate) fn rms_norm(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        if self.fused { x.apply_op2(weight, RmsNorm) } else { rms_norm_plain(x, weight) }
    }

    /// Computes silu(gate) * up for `[N, 2 F]`.
    pub(crate) fn swiglu(self, gate_up: &Tensor) -> Result<Tensor> {
        if self.fused { gate_up.apply_op1(SwiGlu) } else { swiglu_plain(gate_up) }
    }

    /// Causal attention over packed sequences: `qkv [N, qkv_dim]` to `[N, D]`.
    pub(crate) fn attention(
        self,
        qkv: &Tensor,
        shape: AttentionShape,
        rotary: &Arc<RotaryTable>,
        lengths: &Arc<Vec<usize>>,
    ) -> Result<Tensor> {
        if self.fused {
            qkv.apply_op1(Attention { shape, rotary: rotary.clone(), lengths: lengths.clone() })
        } else {
            attention_plain(qkv, shape, rotary, lengths)
        }
    }

    /// Log-probabilities `[M]` of chosen tokens among the legal ones, from `logits [M, V]`.
    pub(crate) fn masked_logprob(self, logits: &Tensor, choices: Vec<(Token, ActionMask)>) -> Result<Tensor> {
        if self.fused { logits.apply_op1(MaskedLogprob { choices }) } else { masked_logprob_plain(logits, &choices) }
    }
}

/// As the fused normalisation, in plain candle operations.
///
/// # Errors
/// When the shapes disagree.
pub fn rms_norm_plain(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    x.broadcast_div(&(mean_square + 1e-6)?.sqrt()?)?.broadcast_mul(weight)
}

/// As the fused SwiGLU, in plain candle operations.
///
/// # Errors
/// When the last dimension is odd.
pub fn swiglu_plain(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.chunk(2, D::Minus1)?;
    halves[0].silu()? * &halves[1]
}

/// As the fused attention, in plain candle operations, one sequence after another.
///
/// # Errors
/// When the shapes disagree.
pub fn attention_plain(
    qkv: &Tensor,
    shape: AttentionShape,
    rotary: &RotaryTable,
    lengths: &[usize],
) -> Result<Tensor> {
    let (_, dim) = qkv.dims2()?;
    let half = shape.head_dim / 2;
    let mut outputs = Vec::new();
    let mut start = 0;
    for len in lengths.iter().copied() {
        let rows = qkv.narrow(0, start, len)?;
        start += len;
        let heads = rows.reshape((len, dim / shape.head_dim, shape.head_dim))?.transpose(0, 1)?;
        let split = |from: usize, count: usize| heads.narrow(0, from, count)?.contiguous();
        let table = |sines: bool| {
            let values = (0..len).flat_map(|position| {
                let (cosine, sine) = rotary.at(position);
                if sines { sine.to_vec() } else { cosine.to_vec() }
            });
            Tensor::from_vec(values.collect::<Vec<f32>>(), (len, half), qkv.device())
        };
        let (cosines, sines) = (table(false)?, table(true)?);
        let rotate = |x: &Tensor| {
            let (low, high) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
            let new_low = (low.broadcast_mul(&cosines)? - high.broadcast_mul(&sines)?)?;
            let new_high = (high.broadcast_mul(&cosines)? + low.broadcast_mul(&sines)?)?;
            Tensor::cat(&[new_low, new_high], 2)
        };
        let repeat = |x: Tensor| {
            let per_head = shape.num_heads / shape.num_kv_heads;
            x.unsqueeze(1)?
                .broadcast_as((shape.num_kv_heads, per_head, len, shape.head_dim))?
                .reshape((shape.num_heads, len, shape.head_dim))
        };
        let queries = rotate(&split(0, shape.num_heads)?)?;
        let keys = repeat(rotate(&split(shape.num_heads, shape.num_kv_heads)?)?)?;
        let values = repeat(split(shape.num_heads + shape.num_kv_heads, shape.num_kv_heads)?)?;
        let future = (0..len * len).map(|index| if index % len > index / len { -1e9f32 } else { 0.0 });
        let future = Tensor::from_vec(future.collect::<Vec<_>>(), (len, len), qkv.device())?;
        let scores = (queries.matmul(&keys.t()?)? * (1.0 / (shape.head_dim as f64).sqrt()))?;
        let scores = scores.broadcast_add(&future)?;
        let exponentials = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
        let out = weights.matmul(&values)?.transpose(0, 1)?;
        outputs.push(out.reshape((len, shape.num_heads * shape.head_dim))?);
    }
    Tensor::cat(&outputs, 0)
}

/// As the fused masked log-probability, in plain candle operations.
///
/// # Errors
/// When the shapes disagree.
pub fn masked_logprob_plain(logits: &Tensor, choices: &[(Token, ActionMask)]) -> Result<Tensor> {
    let (rows, vocabulary) = logits.dims2()?;
    let illegal = choices.iter().flat_map(|(_, mask)| {
        (0..vocabulary as Token).map(|token| if mask.contains(token) { 0.0f32 } else { -1e9 })
    });
    let illegal = Tensor::from_vec(illegal.collect::<Vec<_>>(), (rows, vocabulary), logits.device())?;
    let targets: Vec<u32> = choices.iter().map(|(target, _)| u32::from(*target)).collect();
    let targets = Tensor::from_vec(targets, (rows, 1), logits.device())?;
    let masked = (logits + illegal)?;
    let normaliser = masked.log_sum_exp(D::Minus1)?;
    masked.gather(&targets, 1)?.squeeze(1)? - normaliser
}

fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => candle_core::bail!("expected a contiguous tensor, got {layout:?}"),
    }
}

/// Runs `f` on the elements of CPU tensors.
fn with_slices<const N: usize, T>(tensors: [&Tensor; N], f: impl FnOnce([&[f32]; N]) -> T) -> Result<T> {
    let tensors = tensors.map(Tensor::contiguous);
    let mut contiguous = Vec::with_capacity(N);
    for tensor in tensors {
        contiguous.push(tensor?);
    }
    let guards: Vec<_> = contiguous.iter().map(Tensor::storage_and_layout).collect();
    let mut slices = [&[][..]; N];
    for (slot, (storage, layout)) in slices.iter_mut().zip(&guards) {
        match &**storage {
            Storage::Cpu(storage) => *slot = slice(storage, layout)?,
            _ => candle_core::bail!("expected a tensor on the CPU"),
        }
    }
    Ok(f(slices))
}

fn tensor(values: Vec<f32>, shape: &Shape) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)
}

struct Linear;

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout, w: &CpuStorage, w_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inputs) = x_layout.shape().dims2()?;
        let (w_inputs, outputs) = w_layout.shape().dims2()?;
        if inputs != w_inputs {
            candle_core::bail!("linear: expected [_, {w_inputs}], got [{rows}, {inputs}]");
        }
        let weight = PackedMatrix::new(MatrixView::row_major(slice(w, w_layout)?, outputs), inputs, outputs);
        let mut out = vec![0.0; rows * outputs];
        matmul(MatrixView::row_major(slice(x, x_layout)?, inputs), rows, &weight, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((rows, outputs))))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (rows, inputs) = x.dims2()?;
        let (_, outputs) = w.dims2()?;
        let (grad_x, grad_w) = with_slices([x, w, grad], |[x_values, w_values, grad]| {
            let transposed = MatrixView::row_major(w_values, outputs).transposed();
            let mut grad_x = vec![0.0; rows * inputs];
            let weight = PackedMatrix::new(transposed, outputs, inputs);
            matmul(MatrixView::row_major(grad, outputs), rows, &weight, &mut grad_x);
            let mut grad_w = vec![0.0; inputs * outputs];
            let packed_grad = PackedMatrix::new(MatrixView::row_major(grad, outputs), rows, outputs);
            matmul(MatrixView::row_major(x_values, inputs).transposed(), inputs, &packed_grad, &mut grad_w);
            (grad_x, grad_w)
        })?;
        Ok((Some(tensor(grad_x, x.shape())?), Some(tensor(grad_w, w.shape())?)))
    }
}

struct RmsNorm;

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout, w: &CpuStorage, w_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, x_layout)?;
        let mut out = vec![0.0; x.len()];
        rms_norm(x, slice(w, w_layout)?, &mut out);
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad_x, grad_w) = with_slices([x, w, grad], |[x, w, grad]| {
            let (mut grad_x, mut grad_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
            rms_norm_backward(x, w, grad, &mut grad_x, &mut grad_w);
            (grad_x, grad_w)
        })?;
        Ok((Some(tensor(grad_x, x.shape())?), Some(tensor(grad_w, w.shape())?)))
    }
}

struct SwiGlu;

impl CustomOp1 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, width) = layout.shape().dims2()?;
        let mut out = vec![0.0; rows * width / 2];
        swiglu(slice(x, layout)?, &mut out, width / 2);
        Ok((CpuStorage::F32(out), Shape::from((rows, width / 2))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = x.dims2()?;
        let grad_x = with_slices([x, grad], |[x, grad]| {
            let mut grad_x = vec![0.0; x.len()];
            swiglu_backward(x, grad, &mut grad_x, width / 2);
            grad_x
        })?;
        Ok(Some(tensor(grad_x, x.shape())?))
    }
}

struct Attention {
    shape: AttentionShape,
    rotary: Arc<RotaryTable>,
    lengths: Arc<Vec<usize>>,
}

impl CustomOp1 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, dim) = layout.shape().dims2()?;
        if dim != self.shape.qkv_dim() || rows != self.lengths.iter().sum::<usize>() {
            candle_core::bail!("attention: expected [{:?}, {}], got [{rows}, {dim}]", self.lengths, self.shape.qkv_dim());
        }
        let width = self.shape.num_heads * self.shape.head_dim;
        let mut out = vec![0.0; rows * width];
        attention_forward(self.shape, &self.rotary, &self.lengths, slice(qkv, layout)?, &mut out);
        Ok((CpuStorage::F32(out), Shape::from((rows, width))))
    }

    fn bwd(&self, qkv: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad_qkv = with_slices([qkv, grad], |[qkv, grad]| {
            let mut grad_qkv = vec![0.0; qkv.len()];
            attention_backward(self.shape, &self.rotary, &self.lengths, qkv, grad, &mut grad_qkv);
            grad_qkv
        })?;
        Ok(Some(tensor(grad_qkv, qkv.shape())?))
    }
}

struct MaskedLogprob {
    choices: Vec<(Token, ActionMask)>,
}

impl CustomOp1 for MaskedLogprob {
    fn name(&self) -> &'static str {
        "masked-logprob"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, vocabulary) = layout.shape().dims2()?;
        let rows = slice(logits, layout)?.chunks_exact(vocabulary);
        let choices = self.choices.iter();
        let out: Vec<f32> =
            rows.zip(choices).map(|(logits, (target, mask))| masked_logprob(logits, mask, *target)).collect();
        let shape = Shape::from(out.len());
        Ok((CpuStorage::F32(out), shape))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, vocabulary) = logits.dims2()?;
        let grad_logits = with_slices([logits, grad], |[logits, grad]| {
            let mut grad_logits = vec![0.0; logits.len()];
            let rows = logits.chunks_exact(vocabulary).zip(grad_logits.chunks_exact_mut(vocabulary));
            for (((logits, grad_logits), (target, mask)), scale) in rows.zip(self.choices.iter()).zip(grad) {
                masked_logprob_backward(logits, mask, *target, *scale, grad_logits);
            }
            grad_logits
        })?;
        Ok(Some(tensor(grad_logits, logits.shape())?))
    }
}
